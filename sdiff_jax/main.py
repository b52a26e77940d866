"""Command line: python -m sdiff_jax.main --config=configs/X.py [--workdir=DIR].

Jobs (--job=NAME), each on the work directory DIR:
  demos     make an expert's episodes of Push-T, the data of a policy
  inspect   show and measure the data set as the network sees it: inspect.png
  train     train, or go on with a run that stopped (the default)
  convert   make DIR of the weights in config.convert.file, instead of training
  ema       write DIR/posthoc/WIDTH: an average that the run did not keep, made of
            those that it stored
  sample    write samples.npz and samples.png
  generate  make images, of texts too, by a published model in a folder of the
            diffusers format: images/, images.json and images.png
  encode    write the latents of the images of config.data, to train on
  features  train the features that evaluate measures in: features.npz
  statistics
            mean and covariance of the features of the data: statistics.npz
  evaluate  measure samples of several solvers, or given images, against data
  rollout   let a policy act in Push-T, by several samplers
  report    write report.html on DIR, or on all runs inside it
  study     train and measure all runs of a file of configs/studies, and draw them
  rehearse  compile the step for a pod that is not here (--config.rehearse.topology=v5p:4x4x8):
            memory, collectives and a modelled time: DIR/rehearsal/*.html

Any field of the config can be set: --config.train.steps=500. All fields, with what
they mean, are in sdiff_jax/config.py and in the `build` of the pieces they name.
DIR is runs/X unless given. Without --config, the jobs other than train take the
config that DIR was trained with.

Example, a teacher, its distillation, and pictures from two steps:
  python -m sdiff_jax.main --config=configs/digits_diffusion.py
  python -m sdiff_jax.main --config=configs/digits_scd.py
  python -m sdiff_jax.main --config=configs/digits_scd.py --job=sample
"""

import importlib
import os
import re
import sys

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from sdiff_jax import config as configs
from sdiff_jax.capacity import chips
from sdiff_jax.distributed import processes
from sdiff_jax.experiment import variants
from sdiff_jax.types import UserError

JOBS = (
  "demos",
  "inspect",
  "train",
  "convert",
  "ema",
  "sample",
  "generate",
  "encode",
  "features",
  "statistics",
  "evaluate",
  "rollout",
  "report",
  "study",
  "rehearse",
)

_CONFIG = config_flags.DEFINE_config_file("config", None, "File of the experiment.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; or runs/X.")
_JOB = flags.DEFINE_enum("job", None, JOBS, "What to do; or train, or as config.job.")
# Jobs that make their work directory of a config.
FIRST = ("train", "convert", "generate", "encode", "study", "rehearse")


def main(argv: list[str]) -> None:
  """Runs the job; exits with 2 and one line on a mistake of the user's."""
  from sdiff_jax.experiment import workdir as workdir_lib  # slow to import

  try:
    if len(argv) > 1:
      raise UserError(f"unknown argument {argv[1]!r}; flags start with --")
    config, workdir = _CONFIG.value, os.path.abspath(_workdir())
    workdir_lib.check_writable(workdir)
    name = _job(config)
    # A rehearsal is a compiler alone, whatever machine it runs on.
    chips.start() if name == "rehearse" else processes.start()
    job = importlib.import_module(f"sdiff_jax.jobs.{name}")
    if config is None and name in FIRST:
      raise UserError("--config is missing: name a file of configs/")
    if config is None and name != "report":
      config = workdir_lib.read(workdir)
    if config is not None:
      configs.validate(config)
    _cache_compilations()
    with workdir_lib.errors(workdir):
      made = job.run(config, workdir)
    if jax.process_index() == 0:
      print(made)
  except UserError as error:
    _refuse(str(error))
  except Exception:
    processes.exit_now(1)
    raise


def parse(argv: list[str]) -> list[str]:
  """Parses the flags; a field that does not exist or has another type is refused."""
  if "--help" in argv:
    app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)  # absl's own exits 1
  given = [a.removeprefix("--config=") for a in argv if a.startswith("--config=")]
  files = [name.partition(".py")[0] + ".py" for name in given]
  if missing := [file for file in files if not os.path.exists(file)]:
    _refuse(f"--config={missing[0]}: no such file")
  fields = [a for a in argv if a.startswith("--config.")]
  if fields and not given and "--config" not in argv:
    _refuse(f"{fields[0]}: name the file of the config as well, --config=configs/X.py")
  names = [a.removeprefix("--config.").partition("=")[0] for a in fields]
  for old in [name for name in names if name in configs.RENAMED]:
    _refuse(f"--config.{old}: is now --config.{configs.RENAMED[old]}")
  try:
    return flags.FLAGS(argv)
  except (AttributeError, KeyError) as error:  # of a config without that field
    field = re.sub(r"\\n|\\?'", " ", str(error.args[0]))  # the name, quoted twice
    _refuse(f"--config has no such field: {field}")
  except (flags.Error, OSError, UserError) as error:
    _refuse(f"{error}; see --help")


def _refuse(message: str) -> None:
  print("error:", " ".join(message.split()), file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  # Not sys.exit, which waits: for other processes that wait for this one elsewhere,
  # and for minutes for threads of Orbax where a folder could not be made.
  os._exit(2)


def _workdir() -> str:
  """Returns --workdir, or runs/X_words for --config=configs/X.py:words."""
  if _WORKDIR.value is not None:
    return _WORKDIR.value
  if _CONFIG.value is None:
    raise UserError("--config and --workdir are missing: give one of them; see --help")
  return variants.workdir(config_flags.get_config_filename(flags.FLAGS["config"]))


def _job(config: ml_collections.ConfigDict | None) -> str:
  """Returns the job that was asked for, or the config's own.

  Raises:
    UserError: there is none of that name, or the config is not one to train.
  """
  own = "train" if config is None else config.job
  name = _JOB.value or own
  if own not in JOBS:
    raise UserError(f"config.job={own!r}: take one of {', '.join(JOBS)}")
  also = {"generate": ("rehearse", "evaluate"), "encode": ("inspect",)}
  if own != "train" and name not in (own, *also.get(own, ())):
    raise UserError(f"--job={name}: this config is for --job={own} alone")
  return name


def _cache_compilations() -> None:
  """Keeps compiled programs between runs, unless JAX was told where already."""
  if jax.config.jax_compilation_cache_dir is None:
    folder = os.path.expanduser("~/.cache/sdiff_jax/xla")
    jax.config.update("jax_compilation_cache_dir", folder)


if __name__ == "__main__":
  # Orbax logs, with tracebacks, what it raises as well.
  logging.set_verbosity(logging.FATAL)
  app.run(main, flags_parser=parse)
