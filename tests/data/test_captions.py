"""Images with captions in every layout, and what they are encoded as."""

import io
import json
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FIXTURES
from PIL import Image

from sdiff_jax import config as configs
from sdiff_jax.data import batches, captions, latents
from sdiff_jax.diffusion import guidance
from sdiff_jax.io import downloads, storage
from sdiff_jax.jobs import encode
from sdiff_jax.pretrained.diffusers import loading
from sdiff_jax.types import UserError

SD2 = FIXTURES / "tiny-sd2"
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (5, 16, 16, 3), np.uint8)
TEXTS = ["a cat", "a dog", "a cat", "two  birds\n", ""]
NORMALIZED = ["a cat", "a dog", "a cat", "two birds", ""]


def png(image) -> bytes:
  file = io.BytesIO()
  Image.fromarray(image).save(file, "PNG")
  return file.getvalue()


def beside(folder):
  for k, (image, text) in enumerate(zip(IMAGES, TEXTS, strict=True)):
    (folder / f"{k}.png").write_bytes(png(image))
    (folder / f"{k}.txt").write_text(text)


def jsonl(folder):
  beside(folder)
  entries = [{"file_name": f"{k}.png", "text": text} for k, text in enumerate(TEXTS)]
  for k in range(len(TEXTS)):
    (folder / f"{k}.txt").unlink()
  lines = "\n".join(map(json.dumps, entries))
  (folder / "metadata.jsonl").write_text(lines)


def one_json(folder):
  jsonl(folder)
  (folder / "metadata.jsonl").unlink()
  listed = {f"{k}.png": text for k, text in enumerate(TEXTS)}
  (folder / "captions.json").write_text(json.dumps(listed))


def tars(folder):
  for name, numbers in (("a.tar", (0, 1, 2)), ("b.tar", (3, 4))):
    with tarfile.open(folder / name, "w") as tar:
      for k in numbers:
        text = json.dumps({"caption": TEXTS[k]}) if k % 2 else TEXTS[k]
        ending = "json" if k % 2 else "txt"
        for file, data in (
          (f"{k}.png", png(IMAGES[k])),
          (f"{k}.{ending}", text.encode()),
        ):
          info = tarfile.TarInfo(file)
          info.size = len(data)
          tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("write", [beside, jsonl, one_json, tars])
def test_layouts(write, tmp_path):
  write(tmp_path)
  source = captions.build(dir=str(tmp_path), image_size=16)
  assert len(source) == 5
  order = np.array([3, 0, 4])
  np.testing.assert_array_equal(source[order][0], IMAGES[order])
  assert source.captions(order) == [NORMALIZED[k] for k in order]
  digest = source.digest()
  assert captions.build(dir=str(tmp_path), image_size=16).digest() == digest
  subset = source.subset(np.array([1, 3]))
  assert subset.captions(np.array([1])) == ["two birds"]


def test_tars_of_a_bucket_and_no_images(bucket, tmp_path, monkeypatch):
  monkeypatch.setattr(downloads, "FOLDER", str(tmp_path / "copies"))
  tars(tmp_path)
  there = f"{bucket}/{tmp_path.name}"
  for name in ("a.tar", "b.tar"):
    storage.upload(str(tmp_path / name), f"{there}/deep/{name}")
  source = captions.build(dir=there, image_size=16)
  order = np.array([3, 0, 4])
  np.testing.assert_array_equal(source[order][0], IMAGES[order])
  assert source.captions(order) == [NORMALIZED[k] for k in order]
  assert captions.build(dir=there, image_size=16).digest() == source.digest()
  storage.upload(str(tmp_path / "a.tar"), f"{there}/x.png")
  with pytest.raises(ValueError, match="in a bucket each image would be a request"):
    captions.build(dir=there)


@pytest.mark.parametrize(
  ("write", "message"),
  [
    (lambda folder: folder.rmdir(), "is not a folder; name one of images with"),
    (lambda folder: None, "no images; put .png"),
    (
      lambda folder: (folder / "x.png").write_bytes(png(IMAGES[0])),
      "no caption of x.png and of 0 more; put a .txt beside each image",
    ),
    (
      lambda folder: (folder / "x.tar").write_bytes(b"no tar" * 200),
      "x.tar is damaged",
    ),
    (
      lambda folder: (folder / "metadata.jsonl").write_text('{"file_name": '),
      "metadata.jsonl is damaged",
    ),
  ],
)
def test_folders_that_are_refused(tmp_path, write, message):
  folder = tmp_path / "data"
  folder.mkdir()
  write(folder)
  with pytest.raises((ValueError, UserError), match=message) as error:
    captions.build(dir=str(folder), image_size=16)
  assert "\n" not in str(error.value)


def config(folder, **fields):
  c = configs.base()
  c.data = configs.component("data", "captions", dir=str(folder), image_size=16)
  c.vae = c.text_encoder = str(SD2)
  c.encode.update(batch_size=8, shard_size=3, scale="vae")
  c.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
  return c


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
  """The folder of latents and captions of the images above."""
  folder = tmp_path_factory.mktemp("captions")
  (folder / "images").mkdir()
  beside(folder / "images")
  encode.run(config(folder / "images"), str(folder / "latents"))
  return folder


def test_captions_are_encoded_once(encoded):
  """The conditions are those of the text encoder; each caption is stored once."""
  source = latents.build(dir=str(encoded / "latents"), scale="vae")
  assert json.loads((encoded / "latents" / "latents.json").read_text())["texts"] == 4
  moments, cond = source[np.arange(5)]
  assert sorted(cond) == ["empty_text", "text"]
  assert source.cond["text"].shape == cond["text"].shape[1:] == (12, 24)
  model = loading.load(str(SD2))
  ids = {"text_encoder": jnp.asarray(model.tokenizer.encode(NORMALIZED))}
  wanted = jax.jit(model.encode)(model.params, ids)["text"]
  np.testing.assert_allclose(cond["text"], wanted, rtol=1e-3, atol=1e-3)
  np.testing.assert_array_equal(cond["empty_text"], cond["text"][[4] * 5])
  pixels = (IMAGES / 127.5 - 1).astype(np.float32)
  mean, _ = jax.jit(model.vae.encode)(model.params["vae"], pixels)
  np.testing.assert_allclose(moments[..., :4], mean, rtol=2e-3, atol=2e-3)
  # In the unit of the network: latents times the factor of the autoencoder.
  x0 = source.codec.encode(np.concatenate([mean, 0 * mean], -1), 1.0, [(0,)] * 5)
  np.testing.assert_allclose(x0, mean * model.vae.scaling, rtol=1e-5)
  batch = next(batches(source, seed=0, batch_size=2, sigma_d=0.5))
  assert batch["cond"]["text"].shape == (2, 12, 24)


def test_what_is_missing_is_encoded_again_alike(encoded, tmp_path):
  folder = encoded / "latents"
  whole = {p.name: p.read_bytes() for p in folder.glob("*-of-*")}
  assert len(whole) == 4  # two of latents, two of texts
  for name in ("texts-00001-of-00002", "latents-00000-of-00002"):
    (folder / f"{name}.array_record").unlink()
  with pytest.raises(UserError, match="is missing, and 0 more: --job=encode"):
    latents.build(dir=str(folder), scale="vae")
  encode.run(config(encoded / "images"), str(folder))
  assert {p.name: p.read_bytes() for p in folder.glob("*-of-*")} == whole


def test_images_without_an_autoencoder(encoded, tmp_path):
  c = config(encoded / "images", vae="", encode__scale="pixels")
  encode.run(c, str(tmp_path))
  source = latents.build(dir=str(tmp_path), scale="pixels")
  images, cond = source[np.arange(5)]
  np.testing.assert_array_equal(images, IMAGES)
  assert cond["text"].shape == (5, 12, 24)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"text_encoder": ""}, "config.text_encoder is empty: name a folder"),
    ({"text_encoder": "/none"}, "/none: no such folder"),
    (
      {"text_encoder": str(FIXTURES / "tiny-ddpm-church")},
      "has no text encoder with a tokenizer",
    ),
    ({"encode__scale": "pixels"}, "leave it empty for config.encode.scale='pixels'"),
    ({"data": configs.component("data", "digits")}, "config.data has no captions"),
  ],
)
def test_mistakes(encoded, tmp_path, fields, message):
  with pytest.raises(UserError, match=message):
    encode.run(config(encoded / "images", **fields), str(tmp_path))


def test_captions_are_dropped():
  """A dropped sample has the empty caption, all its arrays alike."""
  rng = np.random.default_rng(0)
  text, pooled = jnp.asarray(rng.normal(size=(64, 3, 2))), jnp.ones((64, 2))
  cond = {"text": text, "pooled": pooled}
  cond |= {"empty_text": jnp.zeros_like(text), "empty_pooled": jnp.zeros_like(pooled)}
  found = guidance.drop_labels(jax.random.key(0), cond, 0.5)
  dropped = np.asarray(found["pooled"][:, 0] == 0)
  assert 16 < dropped.sum() < 48
  np.testing.assert_array_equal(found["text"][dropped], 0)
  np.testing.assert_array_equal(found["text"][~dropped], text[~dropped])
