"""Mistakes on the command line and in config files are one line, and help teaches."""

import subprocess
import sys

import pytest
from command_line import ROOT, TINY, command

from sdiff_jax import config as config_lib
from sdiff_jax import main

# Packages that are slow to import, which a mistake or --help does without.
SLOW = {"clu", "grain", "matplotlib", "orbax", "scipy", "sklearn", "tensorboardX"}
SLOW |= {"jax.experimental.pallas", "tensorflow_datasets", "torch", "zarr", "h5py"}
QUICK = """
import sys
from sdiff_jax import main
main.main(["main", "--help"])
try:
  main.main(["main", "--config=configs/digits_diffusion.py", "--config.train.steps=-1"])
except SystemExit as error:
  print(error.code, *sys.modules)
"""
BASE = "from sdiff_jax import config\ndef get_config():\n  c = config.base()\n"


def test_help_teaches():
  done = subprocess.run(
    command("--help"), cwd=ROOT, capture_output=True, text=True, check=False
  )
  for text in ("--config=configs/digits_scd.py", "evaluate", "report", "--workdir"):
    assert text in done.stdout
  assert "Traceback" not in done.stderr
  assert done.returncode == 0


def test_fields_need_the_file_of_the_config(refused, tmp_path):
  said = refused(f"--workdir={tmp_path}", "--job=sample", "--config.sample.num=3")
  assert "error: --config.sample.num=3: name the file of the config" in said


def test_help_and_mistakes_import_no_slow_packages():
  done = subprocess.run(
    [sys.executable, "-c", QUICK], cwd=ROOT, capture_output=True, text=True, check=True
  )
  code, *modules = done.stdout.splitlines()[-1].split()
  assert code == "2"
  assert not SLOW & {*modules}


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (("--config.train.batch_size=0",), "config.train.batch_size=0: must be at least 1"),
    (("--config.optim.name=sgd",), "config.optim.name='sgd': must be one of adam"),
    (("--config.mesh.fsdp=3",), "config.mesh.data="),
    (
      ("--config.ema.profiles=('x/1',)",),
      "config.ema.profiles: 'x/1': must be power/sigma_rel",
    ),
    (("extra",), "unknown argument 'extra'"),
    (("--bogus=1",), "Unknown command line flag 'bogus'"),
    (("--config.train.stepz=1",), "--config has no such field: stepz"),
    (("--config.train.steps=1.5",), "flag --config.train.steps=1.5: invalid literal"),
    (("--job=paint",), "--job=paint: jobs: no 'paint'"),
    (("--config.job=paint",), "config.job=paint: jobs: no 'paint'"),
    (
      ("--config.train.accumulate=2",),
      "--config.train.accumulate: is now --config.train.grad_accum_steps",
    ),
    (("--config.plugins=no_such",), "config.plugins='no_such': No module named"),
    (("--config.model.name=dot",), "models: no 'dot'; did you mean 'dit'"),
    (("--config=configs/none.py",), "--config=configs/none.py: no such file"),
    (
      ("--config=configs/digits_scd.py:x",),
      "configs/digits_scd.py:x: the only variant",
    ),
    (("--config.sampler.name=rk4",), "config.sampler.name='rk4': must be a solver"),
    (("--config",), "--config=: no such file"),
    (("--config=configs",), "--config=configs: must be a Python file"),
    (("--config=README.md",), "--config=README.md: must be a Python file"),
    (("--config.=1",), "--config.=1: must be --config.SECTION.FIELD=VALUE"),
    (("--config..=1",), "--config..=1: must be --config.SECTION.FIELD=VALUE"),
    (("--config.ema.profiles[3]=x",), "--config.ema.profiles[3]=x: must be"),
    (("--config.data.mean=(0.1,",), "flag --config.data.mean=(0.1,: Error while"),
    (("--config.data.mean=(1,open('x','w'))",), "config.data.mean=("),
    (("--config.data.mean=text",), "config.data.mean=('text',): must be a tuple"),
    (("--config.train.loss_scale=inf",), "config.train.loss_scale=inf: must be fin"),
    (("--config.train.steps=1" + "0" * 30,), "config.train.steps=10000"),
    (("--config.optim.learning_rate=inf",), "config.optim.learning_rate=inf: must be"),
    (("--config.optim.b1=1.5",), "config.optim.b1=1.5: must be at least 0 and below"),
    (("--config.optim.eps=nan",), "config.optim.eps=nan: must be at least 0"),
    (("--config.optim.end_lr_fraction=-1",), "config.optim.end_lr_fraction=-1.0"),
    (("--config.optim.reference_steps=0",), "config.optim.reference_steps=0: must be"),
    (("--config.seed=-1",), "config.seed=-1: must be from 0 to 2147483647"),
    (("--config.seed=2147483648",), "config.seed=2147483648: must be from 0 to"),
    (("--config.sigma_d=inf",), "config.sigma_d=inf: must be from"),
    (("--config.model.depth=0",), "config.model.depth=0: must be from 1 to 1000"),
    (("--config.model.dtype=int3",), "config.model.dtype='int3': must be one of float"),
    (("--config.model.name=a.b",), "models: no 'a.b'; known: ddpmpp"),
    (
      ("--config.ema.profiles=half_life/inf",),
      "config.ema.profiles: 'half_life/inf': images=inf",
    ),
    (
      ("--config.ema.profiles=('power/0.1','power/0.1')",),
      "config.ema.profiles: 'power/0.1' is named twice",
    ),
    (("--config.plugins=..a",), "config.plugins='..a': must be the dotted name"),
    (("--job=",), "--job=: jobs: no ''"),
    (("--workdir=s3://b/r",), "--workdir=s3://b/r: must be a path of this machine, or"),
    (("--workdir=",), "--workdir='': must be a path"),
    (("--workdir=" + "x" * 300,), "--workdir='xxx"),
    (("--workdir=\udcff",), "--workdir='?': must be a path in UTF-8"),
    (("--help=train.step",), "--help=train.step: there is no such field; did you"),
  ],
)
def test_mistakes_are_one_line_and_code_2(refused, tmp_path, args, message):
  config = "--config=configs/digits_diffusion.py"
  said = refused(config, f"--workdir={tmp_path / 'run'}", *TINY, *args)
  assert said.strip().splitlines()[-1].startswith(f"error: {message}")
  assert len(said) < 500
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("def get_config(:\n", "SyntaxError: "),
    ("def f():\nreturn 1\n", "IndentationError: "),
    ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_mod"),
    ("def get_config():\n  return {}\n", "get_config() must return the config that"),
    ("def get_config():\n  raise KeyError('x' * 9999)\n", "KeyError: 'xxx"),
    ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
    ("x = 1\n", "the file must define get_config()"),
    (b"x = '\xff'\n", "SyntaxError: (unicode error)"),
    (b"\0", "SyntaxError: "),
    ("def get_config():\n  return get_config()\n", "RecursionError: "),
    (BASE + "  c.train.steps = 'many'\n  return c", "TypeError: Could not override"),
    (BASE + "  c.train.steps = 1.5\n  return c", "TypeError: Could not override"),
    (BASE + "  del c.train\n  return c", "config.train=None: must be a section"),
    (BASE + "  del c.optim.b1\n  return c", "config.optim.b1: is missing"),
    (BASE + "  c.loss = None\n  return c", "config.loss=None: must be a section"),
    (BASE + "  c.foo = 3\n  return c", "config.foo: there is no such field"),
    *(
      (BASE + f"  c.model = config.component('models', {fields})\n  return c", message)
      for fields, message in (
        ("'dit', patch=0", "config.model.patch=0: must be from 1"),
        ("'dit', heads=0", "config.model.heads=0: must be from 1"),
        ("'ddpmpp', channel_mult=()", "config.model.channel_mult=(): must be a tuple"),
        ("'ddpmpp', channels=0", "config.model.channels=0: must be from 1"),
        ("'ddpmpp', blocks=-1", "config.model.blocks=-1: must be from 0"),
        ("'edm2', head_channels=0", "config.model.head_channels=0: must be from 1"),
      )
    ),
  ],
)
def test_mistakes_in_a_config_file_are_one_line(refused, tmp_path, text, message):
  file = tmp_path / "config.py"
  file.write_bytes(text if isinstance(text, bytes) else text.encode())
  said = refused(f"--config={file}", f"--workdir={tmp_path / 'run'}")
  assert said.removeprefix("error: ").removeprefix(f"{file}: ").startswith(message)
  assert len(said) < 500
  assert said.count("\n") == 1
  assert not (tmp_path / "run").exists()


def test_guidance_that_the_network_does_not_take_is_refused(refused, tmp_path):
  run = f"--workdir={tmp_path / 'run'}"
  for arguments in (
    ("--config=configs/digits_scd.py", "--config.loss.guidance=(1.0, 2.0)"),
    ("--config=configs/digits_scd.py:guided", "--config.class_conditional=False"),
  ):
    assert "config.loss.guidance=(1.0, 2.0): needs data" in refused(*arguments, run)


def test_help_of_a_field(capsys):
  main.main(["main", "--help=config.train.steps"])
  assert capsys.readouterr().out.splitlines() == [
    "train.steps = 1000",
    "  an integer of at least 0",
    "  number of training steps.",
  ]


def test_a_missing_teacher_says_how_to_train_it(refused, tmp_path):
  config = ("--config=configs/digits_scd.py", f"--workdir={tmp_path / 'run'}")
  missing = tmp_path / "no teacher"
  command = "python -m sdiff_jax.main --config=configs/digits_diffusion.py --workdir="
  assert command in refused(*config, f"--config.teacher.workdir={missing}")
  assert command in refused(*config)


def test_the_run_is_named_after_its_config(refused, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = f"--config={ROOT}/configs/digits_scd.py:guided"
  assert "--workdir=runs/digits_diffusion" in refused(config)  # trains its teacher
  missing = f"{tmp_path}/runs/digits_scd_guided/config.json does not exist"
  assert missing in refused(config, "--job=sample")
  said = refused("--job=sample")
  assert said.startswith("error: --config and --workdir are missing")


@pytest.mark.parametrize("job", ["sample", "evaluate", "report"])
def test_jobs_on_an_empty_directory_say_what_to_do_first(refused, tmp_path, job):
  assert "--job=train" in refused(f"--workdir={tmp_path}", f"--job={job}")


def test_another_component_from_the_command_line(monkeypatch):
  """It has its own defaults, and then the other fields of the command line."""
  monkeypatch.chdir(ROOT)
  file = "--config=configs/digits_diffusion.py"
  fields = ("--config.model.patch=2", "--config.model.name=dit", "--config.seed=3")
  config = main.parse(["main", file, *fields, "--config.loss.name=ddpm"]).config
  model, loss = config.model.to_dict(), config.loss.to_dict()
  assert model == config_lib.component("models", "dit", patch=2).to_dict()
  assert loss == config_lib.component("losses", "ddpm").to_dict()
  assert config.seed == 3
  same = main.parse(["main", file, "--config.model.name=mlp"]).config
  assert same.model == main.parse(["main", file]).config.model
