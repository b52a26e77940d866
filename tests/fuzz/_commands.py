"""Command lines: valid ones, strategies that damage them, and what checks them."""

import functools
import pathlib
from typing import Any

import ml_collections
from hypothesis import strategies as st

from sdiff_jax import config as configs
from sdiff_jax import main, registry
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import sampling, teachers, training
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.io import resumable

ROOT = pathlib.Path(__file__).parents[2]
FILES = tuple(
  sorted(f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py"))
)
WORDS = (
  "",
  "tiny",
  "S",
  "XL",
  "S,tiny",
  "tiny,tiny",
  "ddpm",
  "h100",
  "laptop",
  "x",
  ",",
)
JOBS = (
  "train",
  "sample",
  "evaluate",
  "generate",
  "study",
  "convert",
  "report",
  "x",
  "",
)
TEXTS = (
  *(
    "",
    "0",
    "-1",
    "1",
    "2",
    "3",
    "0.5",
    "7",
    "1e309",
    "-1e309",
    "nan",
    "inf",
    "1e-320",
  ),
  *("None", "True", "False", "()", "(1,)", "(1,2,3)", "('x',)", "[1]", "{}", "(None,)"),
  *("1e30", "1000000", "1000000000", "9223372036854775808", "1" * 400, "1" * 5000, "x"),
  *(
    "'x'",
    "x" * 600,
    "(" * 300,
    "[" * 3000,
    "é",
    "\ud800",
    "\x1b[31m",
    "a\nb",
    "%s{0}",
  ),
  *("__import__('os').system('touch /tmp/canary')", "os.system", "/dev/zero", "/"),
  *("float16", "bfloat16", "heun", "ddpm", "paraddpm", "consistency/1", "heun/1e9"),
  *(
    "power/0.1",
    "power/9",
    "adamw",
    "cosine",
    "digits",
    "mlp",
    "dit",
    "edm2",
    "ddpmpp",
  ),
  *("unet1d", "scm", "vsd", "diffusion", "idx", "npz", "folder", "trajectories"),
)
ODD = (
  *(
    "--",
    "-",
    "=",
    "--=",
    "--x",
    "--x=1",
    "x",
    "--config",
    "--config=",
    "--config.",
    "",
  ),
  *(
    "--config.x=1",
    "--config.model=1",
    "--config.model.name",
    "--noconfig",
    "--help=x",
  ),
  *("--workdir=/dev/null/x", "--workdir=", "--flagfile=/dev/zero", "--peer_timeout=x"),
  *("--peer_timeout=-1", "--config.train", "--config.train.steps.x=1", "--config=/dev"),
  *("--config=configs", "--config=\ud800", "--config.__class__=1", "--config.model.=1"),
)


@functools.cache
def _fields(file: str) -> tuple[tuple[str, Any], ...]:
  """Returns the fields of a config and their values."""
  config = configs.load(str(ROOT / file))
  configs.complete(config)
  return tuple(sorted(resumable.flatten(config.to_dict()).items()))


def _changed(value: Any, kind: str) -> str:
  """Returns the text of a value that is like a valid one."""
  if kind == "more" and isinstance(value, int | float):
    return str(value * 10**6 + 1)
  if kind == "less" and isinstance(value, int | float):
    return str(-value)
  if kind == "half" and isinstance(value, int | float):
    return str(value / 3)
  if isinstance(value, tuple | list):
    changed = {"more": (*value, *value, 1), "less": value[1:], "half": ((*value,),)}
    return repr(changed.get(kind, value))
  return str(value) + kind


@st.composite
def commands(draw: st.DrawFn) -> list[str]:
  """Strategy for command lines, almost all of them with mistakes."""
  near = draw(st.booleans())  # a config whose data are at hand
  file = "configs/digits_diffusion.py" if near else draw(st.sampled_from(FILES))
  word = "" if near else draw(st.sampled_from(WORDS))
  argv = ["main", f"--config={ROOT}/{file}" + (f":{word}" if word else "")]
  fields = _fields(file)
  for _ in range(draw(st.sampled_from((1, 1, 1, 2)))):
    name, value = fields[draw(st.integers(0, len(fields) - 1))]
    kind = draw(st.sampled_from(("text", "text", "text", "more", "less", "half", "x")))
    text = draw(st.sampled_from(TEXTS)) if kind == "text" else _changed(value, kind)
    argv.append(f"--config.{name}={text}")
  rare = draw(st.integers(0, 19))
  if rare == 0:
    argv.append(draw(st.sampled_from(ODD)))
  elif rare == 1:
    argv.append(f"--job={draw(st.sampled_from(JOBS))}")
  elif rare == 2:
    section = draw(st.sampled_from(("data", "model", "loss", "sampler")))
    argv.append(f"--config.{section}.name={draw(st.sampled_from(TEXTS))}")
  return argv


def check(argv: list[str], workdir: str) -> None:
  """Does with a command line what is done before anything is computed or written."""
  job, config, _, _ = main.parse([*argv, f"--workdir={workdir}"])
  if config is None:
    config = workdir_lib.read(workdir)
  configs.validate(config)
  registry.lookup("jobs", job)
  if config.data.name == "digits":
    _build(config)


def _build(config: ml_collections.ConfigDict) -> None:
  """Builds network, sampler, loss and optimizer on the digits, without weights."""
  experiment = experiments.build(config)
  sampling.pipeline(config, experiment)
  teacher, _ = teachers.load_teacher(config, experiment)
  trainer = training.build_trainer(config, experiment.network, teacher, experiment.mesh)
  trainer.abstract_state()
