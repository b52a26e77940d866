"""Students of the small folders of the fixtures, exported for diffusers, and their images.

  PYTHONPATH=tests python tests/exported.py FOLDER     # writes a folder for each of them

`third_party/diffusers_export.py` then samples these folders by diffusers.
"""

import pathlib
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax import config as configs
from sdiff_jax import samplers
from sdiff_jax.data import Dataset, LatentCodec, PixelCodec, class_cond
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import sampling
from sdiff_jax.experiment.build import Experiment
from sdiff_jax.experiment.exports import Run
from sdiff_jax.experiment.exports import diffusers as diffusers_format
from sdiff_jax.pretrained.diffusers import loading, trigflow_network
from sdiff_jax.samplers import sequential
from sdiff_jax.training import trainer
from sdiff_jax.types import CondSpec

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
PROMPT = "a cat on the mat"
SIDES = dict.fromkeys(("ddpm-church", "sd2", "sd3", "dit", "sdxl", "pixart"), 8)
SIDES["sd2-guided"] = 8  # with the guidance scale as an input
# Images of SANA have sides of 32 k.
SIDES |= dict.fromkeys(("sana", "sana-sprint", "sana-unguided"), 16)
GUIDANCE = 4.5
# Of SANA's student, which becomes SANA-Sprint.
FIELDS = {"sana": {"guidance": True, "time_scale": 0.001}}
FIELDS |= {name: {"guidance": True} for name in ("sana-sprint", "sd2-guided")}


class Student(NamedTuple):
  """A student that was not trained: the weights of a folder, changed a little."""

  run: Run
  model: loading.Model
  cond: dict


def student(name: str) -> Student:
  published = name.removesuffix("-guided").removesuffix("-unguided")
  folder = str(FIXTURES / f"tiny-{published}")
  model = loading.load(folder)
  shape = (SIDES[name], SIDES[name], model.unet.shape[-1])
  if model.vae is None:
    codec = PixelCodec(shape, (0.0,), (0.5,))
  else:
    mean, std = [
      (value,) * shape[-1] for value in (model.vae.shift, 1 / model.vae.scaling)
    ]
    codec = LatentCodec(shape, mean, std, -1.0)
  cond, specs = {}, {}
  if model.text_encoders:
    tokens = {k: t.encode([PROMPT]) for k, t in model.tokenizers.items()}
    cond = {
      name: x.astype(np.float32)  # of which the mask is a number in data
      for name, x in model.encode(model.params, tokens).items()
      if name != "time_ids"  # which the network adds
    }
    specs = {k: CondSpec(v.shape[1:], np.float32) for k, v in cond.items()}
  elif model.unet.classes:
    specs, cond = class_cond(model.unet.classes), {"label": jnp.array([1])}
  dataset = Dataset(lambda k: None, 0, specs, codec)
  config = configs.base()
  fields = FIELDS.get(name, {})
  config.model = configs.component("models", "pretrained", folder=folder, **fields)
  config.loss = configs.component("losses", "scm", velocity="teacher")
  network = experiments.network(config, dataset)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  vae = None if model.vae is None else (model.vae, model.params["vae"])
  experiment = Experiment(dataset, network, mesh, config.sigma_d, bool(fields), vae=vae)
  source = trigflow_network.parameters(folder, guidance=bool(fields))
  fresh = jax.eval_shape(network.init, jax.random.key(0))["net"]
  rng = np.random.default_rng(0)
  net = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, x.dtype), fresh)
  net = trainer.initialize_from(source, {"net": net})["net"]
  net = jax.tree.map(lambda x: np.asarray(1.02 * x, x.dtype), net)
  return Student(Run(config, config, experiment, {"net": net}), model, cond)


def images(
  made: Student, steps: int, noise: np.ndarray, folder: pathlib.Path, monkeypatch
) -> tuple[np.ndarray, np.ndarray]:
  """Returns samples in the unit of the network, and images, by the steps of diffusers.

  Args:
    made: the student.
    steps: number of steps N of the sampler `consistency`.
    noise: of the first state and after each step, [N, 1, H, W, C].
    folder: that was written.
    monkeypatch: of pytest.
  """
  run, experiment = made.run, made.run.experiment
  sigma_d, codec = experiment.sigma_d, experiment.dataset.codec
  grid = diffusers_format.times(run, loading.configs(str(folder)))[steps]
  sampler = samplers.build("consistency", sigma_d=sigma_d, steps=steps, timesteps=grid)
  # The first state of diffusers has the variance of data and noise, ours that of the
  # noise alone: sin^2 t of it.
  first = noise[:1] / np.float32(np.sin(grid[0]))
  zero = np.zeros_like(first)  # after the last step
  given = jnp.asarray(np.concatenate([first, noise[1:], zero]))
  monkeypatch.setattr(sequential, "noise", lambda keys, i, shape: given[i + 1])
  scale = GUIDANCE if experiment.guidance_input else 1.0
  denoiser = sampling.denoiser(experiment, run.params, scale)
  shape = experiment.dataset.shape
  x = jax.jit(
    lambda cond: samplers.sample(sampler, denoiser, jnp.array([0]), shape, cond).x
  )(made.cond or None)
  vae = experiment.vae
  scaling = vae[0].scaling if vae else 1.0
  sample = np.asarray(x) * codec.std[0] * scaling / sigma_d
  return sample, np.asarray(sampling.decode(experiment, vae and vae[1], x))


def main(folder: str) -> None:
  for name in sys.argv[2:] or SIDES:
    written = diffusers_format.write(student(name).run, f"{folder}/{name}")
    print(name, written.about)


if __name__ == "__main__":
  main(sys.argv[1])
