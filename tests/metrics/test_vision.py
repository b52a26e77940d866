"""Inception, DINOv2 and CLIP against other implementations, and files that are none."""

import json

import formula_weights
import jax
import numpy as np
import pytest
from conftest import FIXTURES
from PIL import Image

from sdiff_jax import config as configs
from sdiff_jax.distributed import sharding
from sdiff_jax.io import image_io
from sdiff_jax.jobs import evaluate
from sdiff_jax.metrics import clip_score, inception_score
from sdiff_jax.metrics.features import (
  FeatureNetwork,
  _clip_weights,
  clip,
  dinov2,
  inception,
  shard_extractor,
)
from sdiff_jax.metrics.features import _resize as resize
from sdiff_jax.types import UserError

TOLERANCE = 1e-4  # of the largest; measured below 1e-6


@pytest.fixture(scope="module")
def peers():
  with np.load(FIXTURES / "vision_features.npz") as arrays:
    found = dict(arrays)
  return found | json.loads(str(found["meta"]))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """A folder of weights by the formula, in .npz."""
  folder = tmp_path_factory.mktemp("weights")
  with np.load(FIXTURES / "inception_fid.npz") as arrays:
    shapes = json.loads(str(arrays["shapes"]))
  tensors = {k: formula_weights.inception(k, tuple(v)) for k, v in shapes.items()}
  np.savez(folder / "inception.npz", **tensors)
  return folder


def saved(path, shapes):
  """Writes weights by the formula; returns them."""
  made = {k: formula_weights.transformer(k, tuple(v)) for k, v in shapes.items()}
  np.savez(path, **made)
  return made


def close(found, expected):
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, expected, atol=TOLERANCE * np.abs(expected).max())


def run(net, images):
  return np.asarray(jax.jit(net.apply)(net.params, images))


@pytest.mark.parametrize(
  ("pixels", "peer", "other"),
  [
    pytest.param(inception.original, "torchfid", "ptfid", marks=pytest.mark.slow),
    (inception.pytorch_fid, "ptfid", "torchfid"),
  ],
)
def test_inception(files, fixture, pixels, peer, other):
  """Each of the two ways to make pixels agrees with its peer, not with the other."""
  expected = fixture("inception_fid")
  net = inception.load(str(files / "inception.npz"), pixels)
  features = run(net, expected["images"])
  close(features, expected[f"{peer}_2048"])
  difference = np.abs(features - expected[f"{other}_2048"]).max()
  assert difference > 30 * TOLERANCE * features.max()
  if peer == "torchfid":
    close(features @ net.head, expected["torchfid_logits_unbiased"])


@pytest.mark.parametrize(
  "kind", [pytest.param("hub", marks=pytest.mark.slow), "transformers"]
)
def test_dinov2(tmp_path, peers, kind):
  """Under both layouts of names; an MLP in one, a gated one in the other."""
  tensors = saved(tmp_path / "x.npz", peers["shapes"][kind])
  net = dinov2.load(str(tmp_path / "x.npz"))
  for size in ("small", "large"):
    close(run(net, peers[size]), peers[f"{kind}_{size}"])
  assert net.metric == "fd_dinov2"
  assert ("mlp.w12" in net.params["blocks.0"]) == (kind == "transformers")
  assert net.params["blocks.1"]["ls2.gamma"].shape == (128,)
  assert len(tensors) == len(peers["shapes"][kind])


def test_positions_are_resized_as_torch_hub_does(tmp_path, peers):
  """transformers' own resizing, without the 0.1, is another one."""
  saved(tmp_path / "x.npz", peers["shapes"]["transformers"])
  features = run(dinov2.load(str(tmp_path / "x.npz")), peers["small"])
  own, hub = (np.abs(features - peers[k]).max() for k in _OTHERS)
  assert own > 30 * hub


_OTHERS = ("own_small", "transformers_small")


@pytest.mark.parametrize(
  ("size", "millions"),
  [
    ((384, 12, False, 1536), 22.06),
    ((768, 12, False, 3072), 86.58),
    pytest.param((1024, 24, False, 4096), 304.37, marks=pytest.mark.slow),
    pytest.param((1536, 40, True, 4096), 1136.48, marks=pytest.mark.slow),
  ],
)
def test_sizes_of_dinov2(size, millions):
  """Those published, with 37 x 37 positions and the mask's token, which is not used."""
  net = dinov2.Transformer(*size)
  shape = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
  params = jax.eval_shape(net.init, jax.random.key(0), shape)
  ours = sum(x.size for x in jax.tree.leaves(params))
  whole = ours + size[0] * (37**2 - 16**2 + 1 + 1)
  assert whole / 1e6 == pytest.approx(millions, abs=0.006)


def score(images: np.ndarray, texts: np.ndarray) -> float:
  return clip_score.score(clip_score.sums(images, texts))


@pytest.mark.parametrize(
  "kind", ["clip", pytest.param("open_clip", marks=pytest.mark.slow)]
)
def test_clip(tmp_path, peers, kind):
  folder = formula_weights.clip_folder(tmp_path / kind, kind)
  found = clip.load(str(folder))
  images = {s: run(found, peers[s]) for s in ("small", "large")}
  for size, features in images.items():
    close(features, peers[f"{kind}_{size}"])
  spec = FIXTURES / "tiny-sd2" / "tokenizer_expected.json"
  texts = found.text(json.loads(spec.read_text())["prompts"])
  close(texts, peers[f"{kind}_text"])
  pairs = np.repeat(images["small"], 2, axis=0)[: len(texts)]
  cosines = (pairs * texts[: len(pairs)]).sum(1)
  assert score(pairs, texts[: len(pairs)]) == pytest.approx(
    100 * np.mean(cosines.clip(0)), rel=1e-5
  )


def test_clip_score_of_made_images(tmp_path, peers):
  """By the job evaluate, in the work directory of the job generate."""
  folder = formula_weights.clip_folder(tmp_path / "clip")
  config = configs.base()
  config.job = "generate"
  config.evaluate.update(features="", clip=str(folder))
  prompts, images = ["a dog", "a cat on a mat", "a dog"], peers["small"][:, :20, :20]
  made = tmp_path / "run" / "images"
  for k, (image, prompt) in enumerate(zip(images, prompts, strict=False)):
    about = json.dumps({"prompt": prompt})
    image_io.save_png(made / f"{k:05}.png", image, about)
  prompts = prompts[: len(images)]
  evaluate.run(config, str(tmp_path / "run"))
  (row,) = json.loads((tmp_path / "run/evaluate/images.json").read_text())
  found = clip.load(str(folder))
  expected = score(run(found, images), found.text(prompts))
  assert row["clip_score"] == pytest.approx(expected, rel=1e-5)
  assert row["clip_score"] > 0
  image_io.save_png(made / "x.png", images[0])
  with pytest.raises(UserError, match=r"x.png holds no prompt: the CLIP score is of"):
    evaluate.run(config, str(tmp_path / "run"))
  config.evaluate.clip = ""
  with pytest.raises(
    UserError, match="config.evaluate: has neither features nor clip; set fea"
  ):
    evaluate.run(config, str(tmp_path / "run"))


def test_clip_score_counts_no_pair_below_zero():
  images = np.array([[1, 0], [0.6, 0.8], [0, 1]], np.float32)
  texts = np.array([[1, 0], [1, 0], [0, -1]], np.float32)
  assert score(images, texts) == pytest.approx(100 * 1.6 / 3)
  with pytest.raises(ValueError, match=r"texts: must have the shape \(3, 2\)"):
    score(images, texts[:2])


G_14 = {
  "embed_dim": 1024,
  "vision_cfg": {"image_size": 224, "layers": 40, "width": 1408, "head_width": 88}
  | {"mlp_ratio": 4.3637, "patch_size": 14},
  "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16}
  | {"layers": 24},
}


@pytest.mark.parametrize(
  ("config", "count"),
  [
    ({"text_config": {}, "vision_config": {}}, 151_277_313),  # ViT-B/32
    pytest.param(_clip_weights.config(G_14), 1_366_678_273, marks=pytest.mark.slow),
  ],
)
def test_sizes_of_clip(config, count):
  """Those published, of which one is the temperature, which is not used."""
  params = jax.eval_shape(clip.from_config(config).init, jax.random.key(0))
  assert sum(x.size for x in jax.tree.leaves(params)) + 1 == count


@pytest.mark.parametrize(
  "size",
  [
    (40, 64),
    pytest.param((90, 91), marks=pytest.mark.slow),
    pytest.param((5, 7), marks=pytest.mark.slow),
  ],
)
def test_pillow_within_one_level(size):
  image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
  for height, width in ((33, 35), (80, 20)):
    theirs = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    ours = np.asarray(resize.pillow_bicubic(image[None], height, width))[0]
    difference = np.abs(ours - np.asarray(theirs, np.float32))
    assert difference.max() <= 1
    assert np.mean(difference > 0) < 2e-3


@pytest.mark.parametrize("size", [7, 299, 512])
def test_resizing_keeps_constants_and_one_size(size):
  for matrix in (resize.tensorflow_bilinear, resize.torch_bilinear):
    np.testing.assert_allclose(matrix(299, size).sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(matrix(size, size), np.eye(size, dtype=np.float32))
  cubic = resize.torch_bicubic(16, 37, 16.1 / 37)
  np.testing.assert_allclose(cubic.sum(1), 1, atol=1e-6)


def _mean_network() -> FeatureNetwork:
  def apply(params, images):
    return images.astype(np.float32).mean(axis=(1, 2)) * params

  return FeatureNetwork("mean", apply, np.float32(2))


@pytest.mark.parametrize("size", [1, 8, 15, 17])
def test_batches_over_all_devices(size):
  images = np.random.default_rng(0).integers(0, 256, (size, 4, 4, 3), np.uint8)
  mesh, asked = sharding.make_mesh(data=2, fsdp=2, window=2), []

  def take(rows):
    asked.append(rows)
    return images[rows]

  extract = shard_extractor(_mean_network(), mesh, batch_size=9)
  parts = [*extract(take, size)]
  assert {len(rows) for rows in asked} == {8}
  np.testing.assert_allclose(
    np.concatenate(parts), 2 * images.mean(axis=(1, 2)), rtol=1e-5
  )


def test_inception_score(fixture):
  z = fixture("fid_arith")
  split = inception_score.splits(200)
  whole = inception_score.sums(z["logits"], split)
  assert inception_score.score(whole) == pytest.approx(float(z["isc_mean"]), rel=1e-6)
  parts = [
    inception_score.sums(z["logits"][s], split[s])
    for s in (slice(0, 33), slice(33, 34), slice(34, 200))
  ]
  together = inception_score.merged(parts[0], inception_score.merged(*parts[1:]))
  assert inception_score.score(together) == pytest.approx(
    inception_score.score(whole), rel=1e-12
  )


def test_inception_score_of_known_classes():
  """Certain of each image, and every class alike: the score is their number."""
  logits = 1e3 * np.eye(5, dtype=np.float32)[np.arange(100) % 5]
  sums = inception_score.sums(logits, inception_score.splits(100))
  assert inception_score.score(sums) == pytest.approx(5, rel=1e-9)
  few = inception_score.sums(logits[:3], inception_score.splits(3))
  assert inception_score.score(few) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("size", [3, 10, 57, 200])
def test_splits_are_equal_runs(size):
  bounds = [i * size // 10 for i in range(11)]
  expected = np.repeat(np.arange(10), np.diff(bounds))
  np.testing.assert_array_equal(inception_score.splits(size), expected)


def test_other_files_are_refused(tmp_path, files, peers):
  path = str(tmp_path / "x.npz")
  with pytest.raises(UserError, match=r"gone.pth.*no such file"):
    inception.load(str(tmp_path / "gone.pth"))
  saved(path, peers["shapes"]["hub"])
  with pytest.raises(
    UserError, match=r"x.npz: the tensors do not fit FID's Inception-v3: missing: Co"
  ):
    inception.load(path)
  with pytest.raises(UserError, match="holds no DINOv2"):
    dinov2.load(str(files / "inception.npz"))
  with_registers = peers["shapes"]["hub"] | {"register_tokens": (1, 4, 128)}
  saved(path, with_registers)
  with pytest.raises(UserError, match="left over: register_tokens$"):
    dinov2.load(path)
  damaged = tmp_path / "x.pth"
  damaged.write_bytes((files / "inception.npz").read_bytes()[:1000])
  with pytest.raises(UserError, match="damaged"):
    inception.load(str(damaged))


def test_other_folders_are_refused(tmp_path, peers):
  with pytest.raises(UserError, match=r"config.json does not exist"):
    clip.load(str(tmp_path))
  folder = formula_weights.clip_folder(tmp_path / "open_clip", "open_clip")
  config = json.loads((folder / "open_clip_config.json").read_text())
  config["model_cfg"]["vision_cfg"]["timm_model_name"] = "vit_x"
  (folder / "open_clip_config.json").write_text(json.dumps(config))
  with pytest.raises(
    UserError, match="no supported CLIP: unknown fields: timm_model_name"
  ):
    clip.load(str(folder))
  config["model_cfg"] = peers["open_clip_config"]["model_cfg"] | {"embed_dim": 9}
  (folder / "open_clip_config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match="the tensors do not fit CLIP's text network"):
    clip.load(str(folder))


@pytest.mark.parametrize("module", [inception, dinov2])
def test_other_images_are_refused(module):
  pixels = getattr(module, "pixels", inception.original)
  with pytest.raises(ValueError, match=r"uint8 \[N, H, W, 3\], got float32"):
    pixels(np.zeros((1, 8, 8, 3), np.float32))
  grey = pixels(np.full((1, 8, 8, 1), 100, np.uint8))
  color = pixels(np.full((1, 8, 8, 3), 100, np.uint8))
  np.testing.assert_array_equal(grey, color)
