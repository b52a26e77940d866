"""Policies of LeRobot and of Diffusion Policy, in the files that they write."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdiff_jax.data.episodes import normalizer
from sdiff_jax.pretrained import diffusion_policy, lerobot
from sdiff_jax.types import UserError

H, DA = 16, 2
LOW, HIGH = np.float32([12.0, 25.0]), np.float32([511.0, 480.0])
CONFIG = {
  "type": "diffusion",
  "n_obs_steps": 2,
  "horizon": H,
  "n_action_steps": 8,
  "input_features": {
    "observation.state": {"type": "STATE", "shape": [4]},
    "observation.environment_state": {"type": "ENV", "shape": [16]},
  },
  "output_features": {"action": {"type": "ACTION", "shape": [DA]}},
  "normalization_mapping": {
    "VISUAL": "MEAN_STD",
    "STATE": "MIN_MAX",
    "ENV": "MEAN_STD",
    "ACTION": "MIN_MAX",
  },
  "down_dims": [16, 32, 48],
  "diffusion_step_embed_dim": 32,
  "noise_scheduler_type": "DDIM",
  "num_inference_steps": 10,
  "vision_backbone": "resnet18",
  "optimizer_lr": 1e-4,
}
STATE = np.float32([[0, -1, 2, 5], [1, 1, 6, 5]])  # the last number never changes
STATS = {
  "observation.state.min": STATE[0],
  "observation.state.max": STATE[1],
  "observation.environment_state.mean": np.arange(16, dtype=np.float32),
  "observation.environment_state.std": np.full(16, 2, np.float32),
  "action.min": LOW,
  "action.max": HIGH,
}


def save(path, tensors: dict) -> None:
  """Writes a .safetensors file."""
  header, body = {}, b""
  for name, x in tensors.items():
    data = np.ascontiguousarray(x, np.float32).tobytes()
    at = [len(body), len(body) + len(data)]
    header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": at}
    body += data
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.fixture
def peer(fixture):
  arrays = fixture("dp_unet1d")
  return {k[2:]: v for k, v in arrays.items() if k.startswith("w/")}, arrays


def write_lerobot(
  folder, tensors: dict, config: dict, *, buffers: bool, stats: dict | None = None
) -> None:
  """Writes a folder, its statistics as buffers or in a file of their own."""
  named = {}
  changed = {k: np.full_like(STATS[k], value) for k, value in (stats or {}).items()}
  for name, x in tensors.items():
    name = name.replace("blocks.0.block", "conv1.block")
    name = name.replace("blocks.1.block", "conv2.block").replace(".2.conv.", ".2.")
    named[f"diffusion.unet.{name}"] = x
  if buffers:
    for name, x in (STATS | changed).items():
      feature, _, kind = name.rpartition(".")
      module = "unnormalize_outputs" if feature == "action" else "normalize_inputs"
      named[f"{module}.buffer_{feature.replace('.', '_')}.{kind}"] = x
  else:
    save(folder / "policy_preprocessor_step_3_normalizer_processor.safetensors", STATS)
  save(folder / "model.safetensors", named)
  (folder / "config.json").write_text(json.dumps(config))


def predict(policy, arrays) -> np.ndarray:
  x, time = (jnp.asarray(arrays[k], jnp.float32) for k in ("sample", "timestep"))
  cond = {"observation": jnp.asarray(arrays["global_cond"])}
  return jax.jit(policy.network.apply)(policy.params, x, time, cond)


@pytest.mark.parametrize("buffers", [True, False])
def test_lerobot(tmp_path, peer, buffers):
  tensors, arrays = peer
  write_lerobot(tmp_path, tensors, CONFIG, buffers=buffers)
  policy = lerobot.load(str(tmp_path))
  fitted = policy.normalizer
  assert (policy.num_steps, policy.n_action_steps, fitted.steps) == (10, 8, 2)
  assert (policy.schedule.solver, policy.schedule.clip) == ("ddim", 1.0)
  assert fitted.shape == policy.network.shape == (H, DA)
  ends = normalizer.denormalize(fitted.action, np.float32([[-1, -1], [1, 1], [0, 0]]))
  np.testing.assert_allclose(ends, [LOW, HIGH, (LOW + HIGH) / 2], rtol=1e-6)
  seen = np.concatenate([STATE, np.tile(np.arange(16) + 2, (2, 1))], 1)
  seen = normalizer.normalize(fitted.observation, seen.astype(np.float32))
  np.testing.assert_allclose(seen[:, :3], [[-1] * 3, [1] * 3], atol=1e-6)
  np.testing.assert_allclose(seen[:, 3], -1)
  np.testing.assert_allclose(seen[:, 4:], 1, rtol=1e-6)
  if buffers:
    wanted = arrays["output"]
    found = np.asarray(predict(policy, arrays))
    assert np.abs(found - wanted).max() / np.abs(wanted).max() < 1e-5


def test_diffusion_policy(tmp_path, peer):
  """Averaged weights are taken, and the sizes of what they are."""
  tensors, arrays = peer
  scale, offset = RNG.uniform(0.1, 2, 20), RNG.normal(size=20)
  file = {f"ema_model.model.{k}": v for k, v in tensors.items()}
  file |= {f"model.model.{k}": 0 * v for k, v in tensors.items()}
  for name, n in (("obs", 20), ("action", 2)):
    head = f"ema_model.normalizer.params_dict.{name}"
    file |= {f"{head}.scale": scale[:n], f"{head}.offset": offset[:n]}
  save(tmp_path / "policy.safetensors", file)
  policy = diffusion_policy.load(str(tmp_path / "policy.safetensors"))
  assert policy.normalizer.steps == 2
  x = RNG.normal(size=(5, 20)).astype(np.float32)
  y = normalizer.normalize(policy.normalizer.observation, x)
  np.testing.assert_allclose(y, x * scale + offset, rtol=1e-5, atol=1e-5)
  wanted = arrays["output"]
  found = np.asarray(predict(policy, arrays))
  assert np.abs(found - wanted).max() / np.abs(wanted).max() < 1e-5
  for gone, message in (
    ("ema_model.normalizer.params_dict.action.scale", "has no normalizer.params_dict"),
    ("ema_model.model.diffusion_step_encoder.3.bias", "is no U-Net of Diffusion Pol"),
    ("ema_model.model.final_conv.0.block.1.bias", "missing: final_conv.0.block.1.bias"),
  ):
    save(tmp_path / "a.safetensors", {k: v for k, v in file.items() if k != gone})
    with pytest.raises(UserError, match=message):
      diffusion_policy.load(str(tmp_path / "a.safetensors"))


def test_what_the_file_does_not_tell(tmp_path, fixture, capsys):
  """Groups of the norms and the scheduler are arguments; what is assumed is printed."""
  arrays = fixture("dp_unet1d")
  file = {f"model.{k[2:]}": v for k, v in arrays.items() if k.startswith("w/")}
  for name, n in (("obs", 20), ("action", 2)):
    head = f"normalizer.params_dict.{name}"
    file |= {f"{head}.scale": np.ones(n), f"{head}.offset": np.zeros(n)}
  path = str(tmp_path / "policy.npz")
  np.savez(path, **file)
  policy = diffusion_policy.load(path)
  said = capsys.readouterr().err
  assert (
    "assumed horizon=16, n_action_steps=8, groups=8, and 100 timesteps of DD" in said
  )
  other = diffusion_policy.load(path, groups=4, scheduler={"num_train_timesteps": 50})
  assert (policy.fields["groups"], other.fields["groups"]) == (8, 4)
  assert (len(other.schedule.abar), other.num_steps) == (50, 50)
  x, cond = jnp.asarray(arrays["sample"]), jnp.asarray(arrays["global_cond"])
  args = x, jnp.asarray(arrays["timestep"], jnp.float32), {"observation": cond}
  found = [jax.jit(p.network.apply)(p.params, *args) for p in (policy, other)]
  scale = np.abs(arrays["output"]).max()
  assert np.abs(found[0] - arrays["output"]).max() < 1e-5 * scale
  assert np.abs(found[1] - arrays["output"]).max() > 1e-2 * scale
  with pytest.raises(ValueError, match="prediction_type='flow': must be one of"):
    diffusion_policy.load(path, scheduler={"prediction_type": "flow"})
  with pytest.raises(UserError, match="groups=0: must divide channels"):
    diffusion_policy.load(path, groups=0)


RNG = np.random.default_rng(0)
IMAGES = CONFIG["input_features"] | {"observation.image": {"shape": [3, 96, 96]}}


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"more": 1, "type": "act"}, "unknown fields: more; values not supported: type="),
    ({"input_features": IMAGES}, "input_features .*observation.image.*: .* no images"),
    ({"output_features": {}}, "output_features: no action"),
    ({"noise_scheduler_type": "Euler"}, "_class_name='EulerScheduler': must be one of"),
    ({"horizon": 10}, r"4 must divide the steps of \(10, 2\)"),
    ({"down_dims": [16, 32]}, "left over: .*mid_modules|of another shape"),
    (
      {"normalization_mapping": {"ACTION": "LOG"}},
      "ACTION='LOG': must be one of MIN_MAX, MEAN",
    ),
    ({"output_features": {"action": {"shape": [3]}}}, "no statistics action.min and"),
  ],
)
def test_folders_that_do_not_fit(tmp_path, peer, changed, message):
  write_lerobot(tmp_path, peer[0], CONFIG | changed, buffers=True)
  with pytest.raises(UserError, match=message) as caught:
    lerobot.load(str(tmp_path))
  assert str(tmp_path) in str(caught.value)


def test_missing_files(tmp_path):
  with pytest.raises(UserError, match="config.json does not exist"):
    lerobot.load(str(tmp_path))
  (tmp_path / "config.json").write_text("[1")
  with pytest.raises(UserError, match=r"config.json is not valid JSON \(Expecting"):
    lerobot.load(str(tmp_path))
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))
  with pytest.raises(UserError, match="has no model.safetensors"):
    lerobot.load(str(tmp_path))


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("observation.environment_state.std", -1.0, "std is negative"),
    ("observation.environment_state.std", np.nan, "must be finite"),
    ("observation.environment_state.mean", np.inf, "must be finite"),
    ("observation.state.max", -5.0, "max is below observation.state.min"),
  ],
)
def test_statistics_without_sense_are_refused(tmp_path, peer, name, value, message):
  write_lerobot(tmp_path, peer[0], CONFIG, buffers=True, stats={name: value})
  with pytest.raises(UserError, match=message):
    lerobot.load(str(tmp_path))


@pytest.mark.parametrize("size", [2**40, 2**31, 0, -1, 1.5, "2", None, 10**30])
def test_sizes_without_sense_are_refused(tmp_path, peer, size):
  feature = {"action": {"type": "ACTION", "shape": [size]}}
  write_lerobot(tmp_path, peer[0], CONFIG | {"output_features": feature}, buffers=True)
  with pytest.raises(UserError, match="config.json") as error:
    lerobot.load(str(tmp_path))
  assert len(str(error.value)) < 500
