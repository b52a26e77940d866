"""Images to latents to a network to images, by the autoencoder of the fixtures."""

import functools
import json
import pathlib

import jax
import numpy as np
import pyarrow as pa
import pytest
from conftest import FIXTURES
from PIL import Image
from pyarrow import parquet

from sdiff_jax import config as configs
from sdiff_jax import registry
from sdiff_jax.data import latents
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.jobs import encode, evaluate, sample, train
from sdiff_jax.pretrained.diffusers import loading
from sdiff_jax.types import UserError

SD2 = FIXTURES / "tiny-sd2"
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (21, 16, 16, 3), dtype=np.uint8)
LABELS = np.arange(21) % 3


@functools.cache
def autoencoder():
  return loading.autoencoder(str(SD2))


def settings(tmp_path, images=IMAGES, **fields):
  """Returns the config that encodes images, which are saved for it."""
  path = tmp_path / "images.npz"
  np.savez(path, images=images, labels=LABELS[: len(images)])
  config = configs.base()
  config.data = configs.component("data", "npz", path=str(path))
  config.vae = str(SD2)
  config.encode.update(batch_size=8, shard_size=8)
  config.update_from_flattened_dict(
    {k.replace("__", "."): v for k, v in fields.items()}
  )
  return config


def files(workdir: pathlib.Path) -> dict[str, bytes]:
  return {p.name: p.read_bytes() for p in workdir.glob("latents-*")}


@pytest.mark.parametrize(
  ("scale", "low"), [pytest.param("scm", -1, marks=pytest.mark.slow), ("edm2", 0)]
)
def test_latents_are_the_posteriors_of_the_autoencoder(tmp_path, scale, low):
  config = settings(tmp_path, encode__scale=scale)
  line = encode.run(config, str(tmp_path))
  assert line.startswith("encoded 21 images in 3 files (")
  source = latents.build(dir=str(tmp_path), scale=scale)
  assert (source.size, source.shape, source.num_classes) == (21, (8, 8, 4), 3)
  assert source.codec.vae_min_pixel == low
  moments, cond = source[np.arange(21)]
  np.testing.assert_array_equal(cond["label"], LABELS)
  vae, params = autoencoder()
  pixels = (IMAGES / 255 * (1 - low) + low).astype(np.float32)
  wanted = np.concatenate(jax.jit(vae.encode)(params, pixels), axis=-1)
  np.testing.assert_allclose(moments, wanted, rtol=2e-3, atol=2e-3)
  assert wanted.std() > 0.1


@pytest.mark.slow
def test_what_is_missing_is_made_again_alike(tmp_path):
  config, workdir = settings(tmp_path), tmp_path / "latents"
  encode.run(config, str(workdir))
  whole = files(workdir)
  names = sorted(whole)
  assert len(names) == 3
  (workdir / names[1]).rename(workdir / f"{names[1]}.tmp")  # killed before its end
  (workdir / names[2]).unlink()
  stamp = (workdir / names[0]).stat().st_mtime_ns
  with pytest.raises(UserError, match="is missing, and 1 more: --job=encode has not"):
    latents.build(dir=str(workdir))
  encode.run(config, str(workdir))
  assert files(workdir) == whole
  assert (workdir / names[0]).stat().st_mtime_ns == stamp
  assert encode.run(config, str(workdir)) == f"encoded 21 images in 3 files: {workdir}"


@pytest.mark.slow
def test_each_process_makes_its_own_files(tmp_path, monkeypatch):
  config, whole = settings(tmp_path), tmp_path / "whole"
  encode.run(config, str(whole))
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(encode.sharding, "all_processes", lambda flags, mesh: flags)
  parts = tmp_path / "parts"
  for k, made in ((0, 2), (1, 3)):
    monkeypatch.setattr(jax, "process_index", lambda k=k: k)
    encode.run(config, str(parts))
    assert len(files(parts)) == made
  assert files(parts) == files(whole)


def test_grey_images(tmp_path):
  encode.run(settings(tmp_path, IMAGES[:8, ..., :1]), str(tmp_path))
  grey = latents.build(dir=str(tmp_path))[np.arange(8)][0]
  vae, params = autoencoder()
  pixels = np.repeat(IMAGES[:8, ..., :1], 3, axis=-1) / np.float32(127.5) - 1
  wanted = np.concatenate(jax.jit(vae.encode)(params, pixels), axis=-1)
  np.testing.assert_allclose(grey, wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"vae": ""}, "config.vae is empty: name the folder of an autoencoder"),
    ({"vae": "/none"}, "/none: no such folder"),
    ({"vae": str(SD2 / "unet")}, "unet: holds no AutoencoderKL or AutoencoderDC"),
    ({"encode__scale": "sd"}, "config.encode.scale='sd': must be one of scm, edm2"),
    ({"encode__batch_size": 9}, "config.encode.batch_size=9: does not divide over 8"),
  ],
)
def test_mistakes(tmp_path, fields, message):
  c = settings(tmp_path, **fields)

  def command() -> None:
    configs.validate(c)
    encode.run(c, str(tmp_path / "run"))

  with pytest.raises(UserError, match=message):
    command()
  assert not (tmp_path / "run").exists()


def test_images_that_do_not_fit_and_other_latents_are_refused(tmp_path):
  odd = settings(tmp_path, IMAGES[:, :15])
  with pytest.raises(UserError, match="images of 15 x 16; 2, the autoencoder's factor"):
    encode.run(odd, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()
  encode.run(settings(tmp_path, IMAGES[:8]), str(tmp_path / "run"))
  other = settings(tmp_path, IMAGES[:8], encode__scale="edm2")
  with pytest.raises(UserError, match=r"other latents: scale \(scm there, edm2 now"):
    encode.run(other, str(tmp_path / "run"))
  (tmp_path / "latents.json").write_text("{")
  with pytest.raises(
    UserError, match="latents.json is not valid JSON .*; choose another --work"
  ):
    encode.run(settings(tmp_path), str(tmp_path))
  of_latents = configs.base()
  of_latents.data = configs.component("data", "latents", dir=str(tmp_path / "run"))
  with pytest.raises(UserError, match="config.data are latents: images of them need"):
    encode.run(of_latents, str(tmp_path / "again"))


def latent_run(tmp_path, **fields):
  """Returns the config of a small network on latents, which are made for it."""
  encode.run(settings(tmp_path), str(tmp_path / "latents"))
  config = configs.base()
  config.data = configs.component("data", "latents", dir=str(tmp_path / "latents"))
  config.model = configs.component("models", "mlp", width=16, depth=1)
  config.train.update(steps=3, batch_size=8, log_every=1, sample_every=3)
  config.sampler.update(name="ddim", steps=2)
  config.sample.update(num=10, batch_size=8)
  config.vae = str(SD2)
  config.update_from_flattened_dict(
    {k.replace("__", "."): v for k, v in fields.items()}
  )
  return config


@pytest.mark.slow
def test_from_images_to_latents_to_a_network_to_images(tmp_path):
  config, workdir = latent_run(tmp_path), tmp_path / "run"
  assert train.run(config, str(workdir)).startswith("trained 3 steps")
  with Image.open(workdir / "samples" / "grid_0000003.png") as grid:
    assert grid.size[0] > 3 * 16
  sample.run(workdir_lib.read(str(workdir)), str(workdir))
  with np.load(workdir / "samples.npz") as made:
    images, labels = made["arr_0"], made["arr_1"]
  assert (images.shape, images.dtype) == ((10, 16, 16, 3), np.uint8)
  np.testing.assert_array_equal(labels, np.arange(10) % 3)
  assert images.std() > 5
  assert (workdir / "samples.png").exists()
  config.vae = ""
  with pytest.raises(
    UserError, match="are latents: images of them need their autoenco"
  ):
    sample.run(config, str(workdir))
  config.evaluate.update(features="digits", num=8, batch_size=8)
  with pytest.raises(UserError, match="config.data are latents"):
    evaluate.run(config, str(workdir))


def test_an_autoencoder_decodes_what_the_network_makes(tmp_path):
  """Where the network's x0 is a latent, the image is that of the autoencoder."""
  from sdiff_jax.data import _codecs
  from sdiff_jax.experiment import sampling

  encode.run(settings(tmp_path, encode__scale="edm2"), str(tmp_path / "latents"))
  config = configs.base()
  where = {"dir": str(tmp_path / "latents"), "scale": "edm2"}
  config.data, config.vae = configs.component("data", "latents", **where), str(SD2)
  experiment = experiments.build(config)
  vae, params = autoencoder()
  moments = experiment.dataset[np.arange(8)][0]
  seeds = [(0, 0, 2, row) for row in range(8)]
  z = _codecs.sample_posterior(moments, seeds)
  x0 = experiment.dataset.codec.encode(moments, config.sigma_d, seeds)
  found = jax.jit(functools.partial(sampling.decode, experiment))(params, x0)
  decoded = np.asarray(jax.jit(vae.decode)(params, z))
  wanted = np.clip(np.round(decoded * 255), 0, 255)
  assert np.abs(np.asarray(found).astype(int) - wanted).max() <= 1
  assert sampling.image_shape(experiment) == (16, 16, 3)


def test_an_autoencoder_of_other_latents_is_refused(tmp_path, monkeypatch):
  encode.run(settings(tmp_path), str(tmp_path / "latents"))
  about = tmp_path / "latents" / "latents.json"
  assert json.loads(about.read_text())["vae"] == str(SD2)
  config = configs.base()
  config.data = configs.component("data", "latents", dir=str(tmp_path / "latents"))
  config.vae = str(SD2)
  vae, params = autoencoder()
  wider = lambda folder: (vae._replace(channels=8), params)  # noqa: E731
  monkeypatch.setattr(loading, "autoencoder", wider)
  with pytest.raises(
    UserError, match="latents have 8 channels, those of config.data 4"
  ):
    experiments.build(config)
  assert registry.build("data", config.data.to_dict()).size == 21


@pytest.mark.slow
def test_captions_of_parquet_are_encoded_like_those_of_files(tmp_path):
  """The same images and captions, in the files of the Hub and beside each image."""
  texts, (folder, table) = (
    ["a cat", "two dogs", "a cat"],
    (tmp_path / "a", tmp_path / "b"),
  )
  folder.mkdir()
  table.mkdir()
  for k, text in enumerate(texts):
    Image.fromarray(IMAGES[k]).save(folder / f"{k}.png")
    (folder / f"{k}.txt").write_text(text)
  pngs = [{"bytes": (folder / f"{k}.png").read_bytes()} for k in range(3)]
  columns = pa.table({"image": pa.array(pngs), "text": pa.array(texts)})
  parquet.write_table(columns, table / "train-00000-of-00001.parquet")
  written = []
  for name, directory in (("captions", folder), ("parquet", table)):
    c = configs.base()
    c.data = configs.component("data", name, dir=str(directory), image_size=16)
    c.vae = c.text_encoder = str(SD2)
    c.encode.update(batch_size=8, scale="vae")
    out = tmp_path / name
    assert encode.run(c, str(out)).startswith("encoded 3 images in 1 files")
    written.append({p.name: p.read_bytes() for p in out.glob("*s-*")})
  assert sorted(written[0]) == [
    f"{kind}-00000-of-00001.array_record" for kind in ("latents", "texts")
  ]
  assert written[0] == written[1]
  cond = latents.build(dir=str(tmp_path / "parquet"), scale="vae")[np.arange(3)][1]
  np.testing.assert_array_equal(cond["text"][0], cond["text"][2])
  assert np.abs(cond["text"][0] - cond["text"][1]).max() > 0.1
