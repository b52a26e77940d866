"""What the job `serve` compiles, and that its images are those of `samplers.sample`."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import FIXTURES

from sdiff_jax import config as configs
from sdiff_jax import main, samplers
from sdiff_jax.data import digits
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import sampling, serving
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.jobs import serve
from sdiff_jax.serving.models import Key
from sdiff_jax.training import state
from sdiff_jax.training.checkpoints import Checkpoints
from sdiff_jax.types import UserError


def make_run(workdir: pathlib.Path, factor: float = 1.0) -> str:
  """Makes a run of a small network with classes, whose weights are not trained."""
  config = configs.base()
  config.model = configs.component("models", "mlp", width=8, depth=1)
  config.loss = configs.component("losses", "diffusion")
  config.sampler.update(name="ddim", steps=2)
  config.evaluate.samplers = ("ddim/2",)
  workdir_lib.save_or_check_config(config, str(workdir), digits.build())
  params = experiments.build(config).network.init(jax.random.key(0))
  params = jax.tree.map(lambda x: (x + 0.1) * factor, params)
  with Checkpoints(str(workdir)) as checkpoints:
    created = state.create(params, optax.identity(), tuple(config.ema.profiles))
    checkpoints.save(1, created)
  return str(workdir)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
  return make_run(tmp_path_factory.mktemp("serve") / "run")


@pytest.fixture(scope="module")
def model(run):
  """The model of the run on one device, where passes can be watched."""
  patch = pytest.MonkeyPatch()
  one = sharding.make_mesh(devices=jax.devices()[:1])
  patch.setattr(experiments, "mesh", lambda config: one)
  choice = serving.Choice(live="paraddim/4", batch_sizes=(1, 4))
  yield serving.of_run(workdir_lib.read(run), run, "run", choice)
  patch.undo()


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_images_are_those_of_sample_alone_and_in_a_batch(run, model, scale):
  experiment, params = workdir_lib.trained(workdir_lib.read(run), run)
  sampler = samplers.build("ddim", sigma_d=experiment.sigma_d, steps=2)
  seeds, labels = np.array([7, 100, 3], np.int32), np.array([1, 1, 4], np.int32)
  denoiser = sampling.denoiser(experiment, params, scale)
  cond = {"label": jnp.asarray(labels)}
  wanted = samplers.sample(sampler, denoiser, seeds, experiment.dataset.shape, cond)
  wanted = np.asarray(sampling.decode(experiment, None, wanted.x)).astype(int)
  guided = scale != 1
  rows = model.rows(seeds, labels=labels, guidance=scale if guided else None)
  lane = model.lanes[Key("ddim", 2, guided)]
  together = lane(rows)["images"].astype(int)
  alone = [lane({k: v[[n]] for k, v in rows.items()})["images"][0] for n in range(3)]
  assert abs(together - wanted).max() <= 1
  assert abs(np.stack(alone) - wanted).max() <= 1
  assert together.std() > 1


def test_what_is_compiled(model):
  """All batch sizes of the run's own sampler; single images of what is compared."""
  sizes = {key: lane.sizes for key, lane in model.lanes.items()}
  assert model.default == Key("ddim", 2)
  for guided in (False, True):
    assert sizes[Key("ddim", 2, guided)] == [1, 4]
    assert sizes[Key("paraddim", 4, guided)] == [1]
    assert sizes[Key("ddim", 4, guided)] == [1]
  assert len(sizes) == 6


def test_without_a_class_it_is_that_of_the_job_sample(run, model):
  config = workdir_lib.read(run)
  config.sample.seed = 0
  experiment = experiments.build(config)
  seeds, cond = sampling.seeds_and_conditions(config, experiment, np.arange(12))
  rows = model.rows(seeds)
  assert (rows["label"] == cond["label"]).all()
  assert model.labels(rows).tolist() == [*range(10), 0, 1]


def test_the_passes_are_those_of_the_sampler(model):
  rows, live = model.rows(np.array([5], np.int32)), model.live
  for window, key in ((live.window, live.key), (1, live.sequential)):
    seen = []
    out = live.watch(
      window, rows, lambda begin, d, seen=seen: seen.append((begin[0], d))
    )
    alone = model.lanes[key](rows)
    assert (out["images"] == alone["images"]).all()
    assert len(seen) == out["passes"][0] == alone["passes"][0]
    begins = [int(begin) for begin, _ in seen]
    assert begins == sorted({*begins})
    assert begins[0] == 0
    assert live.pictures(seen[-1][1]).shape == (1, 8, 8, 1)
  assert out["passes"][0] == live.evaluations == 4


@pytest.mark.slow
def test_weights_that_overflow_are_not_finite(tmp_path):
  """They are finite themselves; a run whose weights are not is refused at the start."""
  folder = make_run(tmp_path / "run", factor=1e20)
  choice = serving.Choice(batch_sizes=(2,))
  made = serving.of_run(workdir_lib.read(folder), folder, "run", choice)
  outputs = made.lanes[made.default](made.rows(np.arange(2, dtype=np.int32)))
  assert not outputs["finite"].any()
  broken = make_run(tmp_path / "broken", factor=np.nan)
  with pytest.raises(UserError, match="weights that are not finite"):
    serving.of_run(workdir_lib.read(broken), broken, "run", choice)


@pytest.mark.slow
def test_a_prompt_and_guidance_are_rows(monkeypatch):
  """The image of a text is that of the job `generate`, whatever the scale."""
  config = configs.base()
  config.job = "generate"
  config.generate.folder = str(FIXTURES / "tiny-sd2")
  config.sampler.update(name="ddim", steps=1)
  one = sharding.make_mesh(devices=jax.devices()[:1])
  monkeypatch.setattr(experiments, "mesh", lambda config: one)
  made = serving.of_diffusers(config, "sd", serving.Choice(batch_sizes=(2,)))
  assert made.takes_prompt
  seeds = np.array([1, 1], np.int32)
  rows = made.rows(seeds, prompts=["a cat", "a dog"], guidance=7.5)
  first, second = made.lanes[Key("ddim", 1, True)](rows)["images"]
  assert (first != second).any()
  plain = made.lanes[Key("ddim", 1)](made.rows(seeds, prompts=["a cat", "a cat"]))
  again = made.rows(seeds, prompts=["a cat", "a cat"], guidance=1.0)
  again = made.lanes[Key("ddim", 1, True)](again)["images"]
  assert abs(plain["images"].astype(int) - again).max() <= 1
  assert made.shape == first.shape


@pytest.mark.slow
def test_a_policy_makes_the_actions_of_the_policy_itself(tmp_path):
  """Alone and in a batch; a bound of the passes is a lane of its own."""
  pytest.importorskip("gym_pusht")
  from test_rollout import untrained

  from sdiff_jax.experiment import policies

  folder = untrained(tmp_path)
  choice = serving.Choice(
    samplers=("paraddpm/5",), batch_sizes=(1, 2), max_passes=(2, 9)
  )
  made = serving.of_run(workdir_lib.read(folder), folder, "robot", choice)
  assert (made.makes, made.shape) == ("actions", (2, 5))
  assert {key.max_passes for key in made.lanes} == {0, 2}
  random = np.random.default_rng(1)
  states = np.float32(random.uniform(100, 400, (2, 2, 5)))
  rows = made.rows(np.array([3, 4], np.int32), states)
  outputs = {key.max_passes: lane(rows) for key, lane in made.lanes.items()}
  assert (outputs[2]["passes"] <= 2).all()
  act = policies.load(folder, sampler="paraddpm/5")
  for k, seed in enumerate((3, 4)):
    wanted = act(states[k], seed)
    np.testing.assert_allclose(outputs[0]["actions"][k], wanted, rtol=1e-4, atol=1e-2)


def test_several_work_directories(tmp_path, run):
  (tmp_path / "runs").mkdir()
  parent = str(pathlib.Path(run).parent)
  parsed = main.parse(["main", "--job=serve", f"--workdir={run},{parent}/x/../run"])
  assert parsed.workdir == f"{run},{run}"
  assert [*serve._folders(parsed.workdir)] == [run, run]
  assert [*serve._folders(parent)] == [run]
  assert serve._name(run, ["run"]) == "run-2"
  with pytest.raises(UserError, match="nothing: no such run or folder of runs"):
    [*serve._folders(f"{run},/nothing")]
  with pytest.raises(UserError, match="no trained run"):
    serve._models(None, str(tmp_path / "runs"), configs.base().serve)


@pytest.mark.parametrize(
  ("host", "local"), [("127.0.0.1", True), ("::1", True), ("localhost", True)]
)
def test_no_token_on_this_machine_alone(monkeypatch, host, local):
  monkeypatch.delenv(serve.TOKEN, raising=False)
  assert (serve._token(host) == "") == local
  for other in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
    assert len(serve._token(other)) >= 32
    assert serve._token(other) != serve._token(other)
  monkeypatch.setenv(serve.TOKEN, "a-token-of-my-own")
  assert serve._token(host) == "a-token-of-my-own"
  monkeypatch.setenv(serve.TOKEN, "short")
  with pytest.raises(UserError, match="SDIFF_JAX_TOKEN"):
    serve._token(host)


def test_an_address_that_is_taken():
  from sdiff_jax.serving import server

  section = configs.base().serve
  with server.listen("127.0.0.1", 0) as opened:
    section.port = opened.getsockname()[1]
    with pytest.raises(
      UserError, match=r"config.serve.host=127.0.0.1, port=\d+: Address"
    ):
      serve._listen(server, section)
