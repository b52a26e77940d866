"""Checkpoints in the layout of DiT's and SiT's authors, against a network in PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FIXTURES

from sdiff_jax import config as configs
from sdiff_jax.experiment import published_model
from sdiff_jax.pretrained.diffusers import dit_checkpoint, loading, scheduler
from sdiff_jax.pretrained.files import state_dict
from sdiff_jax.types import UserError

FILE = FIXTURES / "weights" / "dit.pt"
quickly = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
  """The averaged weights alone, in a file whose name says DiT."""
  path = tmp_path_factory.mktemp("raw") / "DiT-tiny.npz"
  np.savez(path, **state_dict.read(str(FILE)))
  return path


def peer() -> dict[str, np.ndarray]:
  with np.load(FIXTURES / "weights" / "dit.npz") as arrays:
    return {k: np.moveaxis(v, 1, -1) if v.ndim == 4 else v for k, v in arrays.items()}


def predict(model: loading.Model, time) -> np.ndarray:
  """Returns the network's output; the second sample has no class."""
  call = lambda x, t: model.unet.apply(  # noqa: E731
    model.params["unet"], x, t, {"label": jnp.array([1, -1])}
  )
  x = jnp.asarray(peer()["x"], jnp.float32)
  return np.asarray(quickly(call)(x, jnp.asarray(time, jnp.float32)))


def test_dit(raw):
  """A state dict; it predicts the noise at the timesteps of DDPM."""
  model, arrays = loading.load(str(raw)), peer()
  assert model.unet.classes == 3
  assert model.schedule.kind == "eps"
  assert scheduler.tableau(model.schedule, 3).time.tolist() == [999, 500, 0]
  np.testing.assert_allclose(predict(model, arrays["t"]), arrays["out"], atol=1e-5)


def test_sit():
  """A checkpoint of training: the averaged weights, and the velocity x0 - eps.

  Its denoiser is x + (1 - t) v at t = 1 - sigma.
  """
  model, arrays = loading.load(str(FILE)), peer()
  found = predict(model, 1 - arrays["t"])
  np.testing.assert_allclose(-found, arrays["out"], atol=1e-5)
  table = scheduler.tableau(model.schedule, 4)
  np.testing.assert_allclose(table.time, [1, 0.75, 0.5, 0.25])
  net = functools.partial(model.unet.apply, model.params["unet"])
  denoise = scheduler.denoiser(net, model.schedule, table)
  x, sigma = jnp.asarray(arrays["x"], jnp.float32), jnp.float32(1 - arrays["t"])
  d = quickly(denoise)(x, sigma, {"label": jnp.array([1, -1])})
  wanted = arrays["x"] + (1 - arrays["t"])[:, None, None, None] * arrays["out"]
  np.testing.assert_allclose(d, wanted, atol=1e-5)


def test_arguments():
  """Texts and numbers beside the tensors; nothing else of the file is kept."""
  tensors, settings = state_dict.read_with_settings(str(FILE))
  assert settings["args.model"] == "SiT-XL/2"
  assert settings["args.ckpt_every"] == 50_000
  assert all(np.any(x) for name, x in tensors.items() if name.endswith("weight"))


def test_with_an_autoencoder():
  config = configs.base()
  config.generate.folder, config.sampler.name = str(FILE), "ddim"
  with pytest.raises(UserError, match="2 channels, and has no vae .* in config.vae"):
    published_model.from_config(config)
  config.vae = str(FIXTURES / "tiny-dit")
  with pytest.raises(UserError, match="has latents of 4 channels, .* of 2"):
    published_model.from_config(config)
  config.generate.folder = str(FIXTURES / "tiny-dit")
  with pytest.raises(UserError, match="must be empty, since .* has a vae"):
    published_model.from_config(config)


def test_wrong_files(raw, tmp_path):
  with np.load(raw) as arrays:
    tensors = dict(arrays)
  np.savez(tmp_path / "net.npz", **tensors)
  with pytest.raises(UserError, match="whether it is of DiT or of SiT; name it DiT-"):
    dit_checkpoint.load(str(tmp_path / "net.npz"))
  for name, message in (
    ("x_embedder.proj.weight", "there is no x_embedder.proj.weight of 4 axes"),
    ("blocks.0.attn.qkv.bias", "missing: transformer_blocks.0.attn1.to_k.bias"),
  ):
    np.savez(tmp_path / "SiT.npz", **{k: v for k, v in tensors.items() if k != name})
    with pytest.raises(UserError, match=message):
      dit_checkpoint.load(str(tmp_path / "SiT.npz"))
