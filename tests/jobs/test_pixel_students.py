"""Text to image without an autoencoder: a PixArt folder, its teacher, and its student."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from conftest import FIXTURES
from PIL import Image

from sdiff_jax import config as configs
from sdiff_jax.data import latents
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.jobs import encode, export, sample, train
from sdiff_jax.pretrained.diffusers import loading, pixart_transformer, saving, weights

PIXART = FIXTURES / "tiny-pixart"
LENGTH = 8  # tokens of a caption
TRANSFORMER = {
  "_class_name": "PixArtTransformer2DModel",
  "sample_size": 8,
  "in_channels": 1,
  "out_channels": 1,
  "num_attention_heads": 2,
  "attention_head_dim": 8,
  "cross_attention_dim": 16,
  "num_layers": 1,
  "caption_channels": 10,
  "use_additional_conditions": False,
  "norm_type": "ada_norm_single",
}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> pathlib.Path:
  """A folder without an autoencoder, with random weights and short texts."""
  folder = tmp_path_factory.mktemp("published")
  params = pixart_transformer.from_config(TRANSFORMER).init(jax.random.key(0))
  _, parts = saving.read(str(PIXART))
  del parts["vae"]
  parts["transformer"] = saving.network(TRANSFORMER, params)
  saving.save(str(folder), {"_class_name": "PixArtAlphaPipeline"}, parts)
  path = folder / "tokenizer" / "tokenizer_config.json"
  config = json.loads(path.read_text()) | {"model_max_length": LENGTH}
  path.write_text(json.dumps(config))
  return folder


@pytest.fixture(scope="module")
def data(published, tmp_path_factory) -> str:
  """Gray images with captions, and what the text encoder makes of them."""
  images, out = (tmp_path_factory.mktemp(name) for name in ("images", "encoded"))
  rng = np.random.default_rng(0)
  for k in range(16):
    pixels = rng.integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(pixels).save(images / f"{k}.png")
    (images / f"{k}.txt").write_text("a Cat" if k % 2 else "the dog on the mat")
  c = configs.base()
  options = {"dir": str(images), "image_size": 8, "channels": 1}
  c.data = configs.component("data", "captions", **options)
  c.text_encoder = str(published)
  c.encode.update(batch_size=8, scale="pixels")
  encode.run(c, str(out))
  return str(out)


def run_of(data: str, folder: pathlib.Path, loss: str, **fields):
  c = configs.base()
  c.data = configs.component("data", "latents", dir=data, scale="pixels")
  c.init_from = str(folder)
  c.model = configs.component("models", "pretrained", folder=str(folder))
  c.loss = configs.component("losses", loss, **fields)
  c.train.update(steps=2, batch_size=8, log_every=1)
  c.text_encoder = str(folder)
  c.sample.update(num=8, batch_size=8, prompts="a cat; the dog")
  return c


@pytest.mark.slow
def test_texts_have_the_length_of_the_tokenizer(data, published):
  """As long as diffusers', they would be the same: padding is not attended to."""
  dataset = latents.build(dir=data, scale="pixels")
  pixels, cond = dataset[np.array([1, 2])]
  assert pixels.dtype == np.uint8
  assert cond["text"].shape == (2, LENGTH, 10)
  np.testing.assert_array_equal(cond["mask"].sum(1), [3, 6])  # with the end token
  model = loading.load(str(published))
  encoder, params = model.text_encoder, model.params["text_encoder"]
  ids = np.zeros((1, 120), np.int32)
  short = model.tokenizer.encode(["A cat "])
  ids[:, :LENGTH] = short
  long = encoder.apply(params, ids, ids != 0).hidden
  np.testing.assert_allclose(cond["text"][:1, :3], long[:, :3], rtol=2e-3, atol=2e-3)


@pytest.mark.slow  # a minute
def test_from_random_weights_to_a_student(data, published, tmp_path):
  """A teacher is trained and exported; from its folder alone, a student, and again."""
  c, workdir = run_of(data, published, "diffusion"), tmp_path / "teacher"
  train.run(c, str(workdir))
  c.export.update(format="diffusers", folder=str(tmp_path / "folder"))
  export.run(c, str(workdir))
  folder = tmp_path / "folder"
  written, source = (
    json.loads((f / "scheduler" / "scheduler_config.json").read_text())
    for f in (folder, published)
  )
  assert written == source  # that of a diffusion model
  card = (folder / "README.md").read_text()
  assert 'from_pretrained(".", vae=None, ' in card
  assert '"a prompt", output_type="latent", use_resolution_binning=False)' in card
  _, params = workdir_lib.trained(workdir_lib.read(str(workdir)), str(workdir))
  part = str(folder / "transformer")
  restored = weights.parameters(part, loading.network(part))
  jax.tree.map(np.testing.assert_array_equal, restored, params["net"])
  shutil.rmtree(workdir)
  for loss, fields in (("scm", {"velocity": "teacher"}), ("cmt", {})):
    c, workdir = run_of(data, folder, loss, **fields), tmp_path / loss
    c.teacher.folder = str(folder)
    c.sampler.update(name="consistency", steps=2)
    train.run(c, str(workdir))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert "8" in sample.run(c, str(workdir))
    c.export.update(format="diffusers", folder="")
    export.run(c, str(workdir))
    out = workdir / "export" / "diffusers"
    index = json.loads((out / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]
    assert "vae" not in index
