"""The command line, as a user meets it: other processes, real files."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image
from quick_xla import xla_flags

from sdiff_jax import config as config_lib
from sdiff_jax import main
from sdiff_jax.experiment import build, training
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.training import checkpoints as checkpoints_lib
from sdiff_jax.training import state

ROOT = pathlib.Path(__file__).parents[1]
# Small enough to take seconds, with every part of the road in it.
TINY = (
  "--config.model.width=16",
  "--config.model.depth=1",
  "--config.train.steps=12",
  "--config.train.batch_size=16",
  "--config.train.log_every=4",
  "--config.train.sample_every=6",
  "--config.checkpoint.every=4",
)


def command(*args: str) -> list[str]:
  return [sys.executable, "-m", "sdiff_jax.main", *args]


def environment(cache, devices: int = 1) -> dict[str, str]:
  return os.environ | {
    "XLA_FLAGS": xla_flags(devices),
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "PYTHONWARNINGS": "ignore",
  }


def call(cache, *args: str, devices: int = 1) -> subprocess.CompletedProcess:
  return subprocess.run(
    command(*args),
    cwd=ROOT,
    env=environment(cache, devices),
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


def works(*args, **options) -> str:
  """Runs a command that must succeed, and returns its last line."""
  done = call(*args, **options)
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def teacher(cache, tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("runs") / "teacher"
  config = "--config=configs/digits_diffusion.py"
  line = works(cache, config, f"--workdir={folder}", *TINY)
  assert line == f"trained 12 steps: {folder}"
  return folder


@pytest.fixture
def refused(capsys, monkeypatch):
  """(args) -> the error of a command that is refused, run in this process."""
  monkeypatch.chdir(ROOT)

  def error(*args: str) -> str:
    with pytest.raises(SystemExit) as caught:
      main.main(["main", *args])
    assert caught.value.code == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text

  return error


def weights(workdir: pathlib.Path) -> state.TrainState:
  """Returns the newest state of a run."""
  config = workdir_lib.read(str(workdir))
  built = build.build(config)
  trainer = training.build_trainer(config, built.network, built.network, built.mesh)
  with checkpoints_lib.Checkpoints(str(workdir)) as checkpoints:
    return checkpoints.restore(trainer.abstract_state())


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


def test_training_leaves_metrics_grids_and_a_summary(teacher):
  lines = (teacher / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [4, 8, 12]
  grids = sorted(p.name for p in (teacher / "samples").iterdir())
  assert grids == ["grid_0000006.png", "grid_0000012.png"]
  summary = json.loads((teacher / "training.json").read_text())
  assert summary["images"] == 12 * 16
  assert summary["flops"] > 0
  assert list((teacher / "tensorboard").iterdir())


@pytest.mark.parametrize(
  "student",
  ["scd", *(pytest.param(s, marks=pytest.mark.slow) for s in ("sct", "scd.py:guided"))],
)
def test_the_road_from_teacher_to_report(cache, teacher, tmp_path, student):
  file, _, word = student.partition(".py")
  run, guided = tmp_path / "student", ("--config.sample.guidance=1.5",)
  config = f"--config=configs/digits_{file}.py{word}"
  field = "init_from" if file == "sct" else "teacher.workdir"
  train = (config, f"--workdir={run}", f"--config.{field}={teacher}", *TINY)
  assert works(cache, *train) == f"trained 12 steps: {run}"
  small = ("--config.sample.num=30", "--config.sample.batch_size=16")
  line = works(cache, *train, *small, *guided, "--job=sample")
  made = rf"made 30 images \([\d.e+]+ images/s, 2 evaluations each\): {run}/samples.npz"
  assert re.fullmatch(made, line)
  with np.load(run / "samples.npz") as arrays:
    assert arrays["arr_0"].shape == (30, 8, 8, 1)
    assert arrays["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(arrays["arr_1"], np.arange(30) % 10)
  assert Image.open(run / "samples.png").size[0] > 8 * 32
  quick = ("--config.evaluate.num=100", "--config.evaluate.batch_size=50")
  works(cache, *train, *quick, *guided, "--job=evaluate")
  rows = json.loads((run / "evaluate" / "results.json").read_text())
  assert [row["evaluations"] for row in rows] == [1, 2]
  assert rows[0]["sampler"] == "consistency/1, guidance 1.5"
  assert all(np.isfinite(row["frechet"]) and row["compute"] > 1 for row in rows)
  line = works(cache, f"--workdir={run}", "--job=report")
  assert line == f"report: {run}/report.html"
  page = (run / "report.html").read_text()
  assert "consistency/2" in page
  assert "data:image/png" in page


@pytest.mark.slow
def test_the_baselines_of_a_teacher(cache, teacher):
  quick = ("--config.evaluate.num=100", "--config.evaluate.batch_size=50")
  config = "--config=configs/digits_diffusion.py"
  works(cache, config, f"--workdir={teacher}", *TINY, *quick, "--job=evaluate")
  rows = json.loads((teacher / "evaluate" / "results.json").read_text())
  found = {(row["model"], row["sampler"]): row for row in rows}
  assert found["teacher", "heun/16"]["evaluations"] == 31
  assert found["teacher", "heun/16"]["compute"] == 1
  for sampler in ("ddim/2", "ddim/4", "ddim/8", "consistency/1", "consistency/2"):
    assert found["teacher", sampler]["kind"] == "baseline"
  half = found["real data", "one half to the other"]["frechet"]
  assert 0 < half < found["Gaussian per class", "full covariance"]["frechet"]


@pytest.mark.slow
def test_an_image_depends_on_its_seed_alone(cache, teacher):
  config = ("--config=configs/digits_diffusion.py", *TINY)
  config += (f"--workdir={teacher}", "--job=sample")

  def images(*args, devices=1):
    works(cache, *config, *args, devices=devices)
    with np.load(teacher / "samples.npz") as arrays:
      return arrays["arr_0"].astype(int)

  one = images("--config.sample.num=12", "--config.sample.batch_size=12")
  two = images("--config.sample.num=12", "--config.sample.batch_size=5")
  mesh = ("--config.mesh.fsdp=2", "--config.sample.batch_size=8")
  many = images("--config.sample.num=12", *mesh, devices=8)
  later = images("--config.sample.num=4", "--config.sample.seed=8")
  # Matmuls round by batch size, which may move a pixel by one level of 256.
  assert np.abs(one - two).max() <= 1
  assert np.abs(one - many).max() <= 1
  assert np.abs(one[8:] - later).max() <= 1
  assert np.abs(one[:4] - later).max() > 50


@pytest.mark.slow
def test_the_road_on_eight_devices(cache, teacher, tmp_path):
  config = ("--config=configs/digits_scd.py", f"--workdir={tmp_path}", *TINY)
  config += (f"--config.teacher.workdir={teacher}", "--config.mesh.fsdp=2")
  assert works(cache, *config, devices=8) == f"trained 12 steps: {tmp_path}"
  assert (tmp_path / "samples" / "grid_0000012.png").exists()
  one, eight = (
    json.loads((d / "training.json").read_text()) for d in (teacher, tmp_path)
  )
  assert 1.3 < eight["flops"] / one["flops"] < 1.75  # counted over all devices
  num = "--config.evaluate.num=100"
  works(cache, *config, num, "--job=evaluate", devices=8)
  odd = "--config.evaluate.batch_size=50"
  done = call(cache, *config, num, odd, "--job=evaluate", devices=8)
  assert done.returncode == 2
  assert "config.evaluate.batch_size=50: does not divide" in done.stderr
  # Killed between its last checkpoint and the summary: the summary comes later.
  (tmp_path / "training.json").unlink()
  works(cache, *config, devices=8)
  assert json.loads((tmp_path / "training.json").read_text()) == eight


@pytest.mark.slow
def test_killed_and_resumed_training_ends_with_the_same_weights(cache, tmp_path):
  config = ("--config=configs/digits_diffusion.py", *TINY, "--config.train.steps=12")
  config += ("--config.checkpoint.every=1", "--config.train.sample_every=0")
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  works(cache, *config, f"--workdir={whole}")
  process = subprocess.Popen(
    command(*config, f"--workdir={killed}"),
    cwd=ROOT,
    env=environment(cache),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  deadline = time.monotonic() + 120
  while not list(killed.glob("checkpoints/[0-9]*")) and time.monotonic() < deadline:
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not (killed / "training.json").exists()  # it was killed on its way
  works(cache, *config, f"--workdir={killed}")
  a, b = weights(whole), weights(killed)
  jax.tree.map(np.testing.assert_array_equal, a, b)
  steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").open("r")]
  assert steps[-1] == 12
  assert len(set(steps)) == len(steps)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(cache, tmp_path):
  config = ("--config=configs/digits_diffusion.py", *TINY, f"--workdir={tmp_path}")
  config += ("--config.train.steps=100000", "--config.checkpoint.every=100000")
  process = subprocess.Popen(
    command(*config),
    cwd=ROOT,
    env=environment(cache),
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  )
  deadline = time.monotonic() + 120
  metrics = tmp_path / "metrics.jsonl"
  while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  said, _ = process.communicate(timeout=30)
  assert process.returncode == 75
  step = int(next(iter((tmp_path / "checkpoints").glob("[0-9]*"))).name)
  assert said.strip().startswith(
    f"stopped at step {step}; repeat the command to resume"
  )
  assert 4 <= step < 100000


@pytest.mark.slow
def test_an_infinite_loss_stops_the_run_with_one_line(cache, tmp_path):
  config = ("--config=configs/digits_diffusion.py", *TINY, f"--workdir={tmp_path}")
  done = call(cache, *config, "--config.optim.learning_rate=1e30")
  assert done.returncode == 2
  line = done.stderr.strip().splitlines()[-1]
  assert line.startswith("error: step ")
  assert "not finite; the last good checkpoint is that of step" in line
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert all(json.loads(line)["loss"] is not None for line in lines)


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


BASE = "from sdiff_jax import config\ndef get_config():\n  c = config.base()\n"


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


def test_a_student_unlike_its_teacher_is_refused(refused, teacher, tmp_path):
  config = ("--config=configs/digits_scd.py", f"--workdir={tmp_path / 'run'}")
  wider = (*TINY, "--config.model.width=32", f"--config.teacher.workdir={teacher}")
  assert "config.init_from: another network: " in refused(*config, *wider)


def test_a_workdir_of_another_experiment_is_refused(refused, teacher):
  config = ("--config=configs/digits_diffusion.py", f"--workdir={teacher}", *TINY)
  said = refused(*config, "--config.optim.learning_rate=0.5")
  assert "optim.learning_rate (0.002 there, 0.5 now)" in said


def test_the_run_is_named_after_its_config(refused, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = f"--config={ROOT}/configs/digits_scd.py:guided"
  assert "--workdir=runs/digits_diffusion" in refused(config)  # trains its teacher
  missing = f"{tmp_path}/runs/digits_scd_guided/config.json does not exist"
  assert missing in refused(config, "--job=sample")
  said = refused("--job=sample")
  assert said.startswith("error: --config and --workdir are missing")


@pytest.mark.slow
def test_timesteps_of_a_sampler_from_the_command_line(cache, refused, teacher):
  config = ("--config=configs/digits_diffusion.py", f"--workdir={teacher}", *TINY)
  config += ("--config.sampler.name=consistency", "--config.sample.num=4")
  angles = "--config.sampler.timesteps=(1.56, 1.3, 0.9)"
  assert ", 3 evaluations each)" in works(cache, *config, angles, "--job=sample")
  said = refused(*config, "--config.sampler.timesteps=(1.1, 1.5)", "--job=sample")
  assert "config.sampler.timesteps=(1.1, 1.5): must decrease" in said


@pytest.mark.parametrize("job", ["sample", "evaluate", "report"])
def test_jobs_on_an_empty_directory_say_what_to_do_first(refused, tmp_path, job):
  assert "--job=train" in refused(f"--workdir={tmp_path}", f"--job={job}")


# A job in a module outside of the package, and a run of it.
PLUGIN = """
import dataclasses
import os
from sdiff_jax import fields, registry

@dataclasses.dataclass
class Count:
  to: fields.Count = 3

@registry.register("jobs", "count", sections={"count": Count}, runtime=("count",))
def run(config, workdir):
  \"\"\"Counts. Nothing else.\"\"\"
  os.makedirs(workdir, exist_ok=True)
  return f"{config.model.width}: {list(range(config.count.to))}"
"""


def test_a_job_from_outside_is_one_file(cache, teacher, tmp_path):
  """It brings its fields and their ranges, and runs from the command line."""
  (tmp_path / "counting.py").write_text(PLUGIN)
  env = environment(cache) | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}

  def run(*args):
    config = ("--config=configs/digits_diffusion.py", "--config.plugins=counting")
    return subprocess.run(
      command(*config, "--job=count", f"--workdir={tmp_path / 'run'}", *args),
      cwd=ROOT,
      env=env,
      capture_output=True,
      text=True,
      check=False,
    )

  done = run("--config.count.to=2", "--config.model.width=24")
  assert done.stdout == "24: [0, 1]\n", done.stderr
  assert (
    run("--config.count.to=0").stderr
    == "error: config.count.to=0: must be at least 1\n"
  )


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
