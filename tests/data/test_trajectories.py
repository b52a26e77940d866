"""Windows of episodes, their normalizers, and the files that episodes come in."""

import json
import struct

import h5py
import hypothesis
import jax
import jax.numpy as jnp
import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import strategies as st

from sdiff_jax import config as configs
from sdiff_jax.data import batches, trajectories
from sdiff_jax.data.episodes import kitchen, normalizer, reader, robomimic
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.jobs import train
from sdiff_jax.types import UserError

RNG = np.random.default_rng(0)
ENDS = np.array([5, 25, 60])
N = 60
ARRAYS = {
  "state": RNG.normal(size=(N, 5)).astype(np.float32),
  "action": (RNG.normal(size=(N, 2)) * [1, 30] + [0, 200]).astype(np.float32),
  "episode_ends": ENDS,
}


@pytest.fixture
def npz(tmp_path):
  """Writes episodes as .npz, some arrays changed, and returns the path."""

  def write(**changed) -> str:
    path = tmp_path / "episodes.npz"
    arrays = ARRAYS | changed
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return str(path)

  return write


def read(path) -> reader.Episodes:
  return reader.read(str(path), keys=robomimic.KEYS, absolute=False)


# Windows.


@hypothesis.given(
  lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
  horizon=st.integers(1, 8),
  data=st.data(),
)
def test_windows_are_those_of_a_padded_episode(lengths, horizon, data):
  """Pads every episode by its edges, and takes every slice of the result."""
  before, after = (data.draw(st.integers(0, horizon - 1)) for _ in range(2))
  ends = np.cumsum(lengths)
  mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(ends))))[: len(ends)]
  expected = []
  for end, length, wanted in zip(ends, lengths, mask, strict=True):
    steps = np.pad(np.arange(end - length, end), (before, after), "edge")
    slices = range(len(steps) - horizon + 1) if wanted else ()
    expected += [steps[i : i + horizon] for i in slices]
  found = trajectories.windows(ends, mask, horizon, before=before, after=after)
  assert found.shape == (len(expected), horizon)
  np.testing.assert_array_equal(found, np.reshape(expected, found.shape))


def test_first_windows_of_an_episode(npz):
  """To = 3 observations, the last of them the first step of the episode."""
  path = npz()
  source = trajectories.build(path=path, horizon=4, n_obs_steps=3, n_action_steps=2)
  # The first episode is 5 long: windows begin 2 before and end 1 after it.
  assert source.size == sum(n - 4 + 1 + 2 + 1 for n in (5, 20, 35))
  assert (source.shape, source.cond["observation"].shape) == ((4, 2), (15,))
  x, cond = source[np.array([4, 0, 5])]
  assert source.codec.encode(x, 0.5).dtype == cond["observation"].dtype == np.float32
  steps = np.array([[2, 3, 4, 4], [0, 0, 0, 1], [5, 5, 5, 6]])
  np.testing.assert_array_equal(x, ARRAYS["action"][steps])
  seen = cond["observation"].reshape(3, 3, 5)
  seen = normalizer.denormalize(source.normalizer.observation, seen)
  np.testing.assert_allclose(seen, ARRAYS["state"][steps[:, :3]], atol=1e-5)
  again = trajectories.observed(source.normalizer, ARRAYS["state"][steps[:, :3]])
  np.testing.assert_array_equal(again, cond["observation"])


def test_x0_has_sigma_d_and_comes_back(npz):
  source = trajectories.build(path=npz())
  x, cond = source[np.arange(source.size)]
  normal = normalizer.normalize(source.normalizer.action, x)
  assert np.abs(normal).max() == pytest.approx(1)
  assert np.abs(cond["observation"]).max() == pytest.approx(1)
  x0 = source.codec.encode(x, 0.3)
  assert x0.dtype == np.float32
  assert np.sqrt(np.mean(x0**2)) == pytest.approx(0.3, rel=0.05)
  found = source.codec.decode(jnp.asarray(x0[-1:]), 0.3)
  assert found.dtype == jnp.float32
  rows = np.clip(np.arange(N - 9, N + 7), 0, N - 1)
  np.testing.assert_allclose(found[0], ARRAYS["action"][rows], rtol=1e-5, atol=1e-3)
  asis = trajectories.build(path=npz(), std=1.0)
  np.testing.assert_array_equal(asis.codec.encode(x, 1.0), normal)


def test_observations_beside_the_state_are_taken(npz):
  observation = RNG.normal(size=(N, 3)).astype(np.float32)
  found = read(npz(observation=observation, keypoint=np.zeros((N, 9, 2))))
  np.testing.assert_array_equal(found.observation, observation)


def test_actions_in_the_frame_of_the_last_observation(npz):
  """A turn of the plane about the agent: what is told in it comes back."""
  angle = RNG.uniform(-3, 3, N)
  c, s = np.cos(angle), np.sin(angle)
  R = np.moveaxis(np.array([[c, -s], [s, c]]), -1, 0)
  frame = np.concatenate([R, ARRAYS["action"][..., None] + 1], -1).astype(np.float32)
  source = trajectories.build(path=npz(frame=frame), action_range="percentile")
  relative, _ = source[np.array([20])]
  assert source.normalizer.action.centre.shape == source.shape
  x0 = source.codec.encode(relative, 0.5)
  np.testing.assert_allclose(source.codec.decode(x0, 0.5), relative, atol=1e-3)
  at = trajectories.windows(ENDS, np.ones(3, bool), 16, before=1, after=7)[20]
  expected = np.stack(
    [R[at[1]] @ (ARRAYS["action"][k] - frame[at[1], :, 2]) for k in at]
  )
  np.testing.assert_allclose(relative[0], expected, atol=1e-3)
  back = trajectories.out_of_frame(jnp.asarray(frame[at[1]][None]), relative)
  np.testing.assert_allclose(back[0], ARRAYS["action"][at], atol=1e-3)


def test_batches_are_functions_of_seed_and_number(npz):
  source = trajectories.build(path=npz())
  options = {"seed": 3, "batch_size": 6, "sigma_d": 0.5}
  ones, later = (batches(source, **options, start=k) for k in (0, 2))
  two = [next(ones) for _ in range(3)][2]
  jax.tree.map(np.testing.assert_array_equal, two, next(later))
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), two["cond"])
  wanted = {name: spec.batch(6) for name, spec in source.cond.items()}
  assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), wanted)


# Normalisers.


def test_ranges(npz):
  x = RNG.normal(size=(500, 4)).astype(np.float32) * [1, 10, 1e-6, 1] + [0, 3, 7, 5]
  x = x.astype(np.float32)
  affine = normalizer.fit(x, "range")
  y = normalizer.normalize(affine, x)
  np.testing.assert_allclose(y.min(0)[[0, 1, 3]], -1, atol=1e-5)
  np.testing.assert_allclose(y.max(0)[[0, 1, 3]], 1, atol=1e-5)
  assert affine.scale[2] == 1  # centred only
  assert np.abs(y[:, 2]).max() < 1e-4
  np.testing.assert_allclose(normalizer.denormalize(affine, y), x, atol=1e-5)
  assert normalizer.fit(x, "range", min_range=8.0).scale.tolist()[0] == 1
  position = normalizer.normalize(normalizer.fit(x, "position"), x)
  np.testing.assert_array_equal(position[:, 3], x[:, 3])
  np.testing.assert_allclose(position[:, :2], y[:, :2])
  largest = normalizer.normalize(normalizer.fit(x, "max_abs"), x)
  assert np.abs(largest).max() == pytest.approx(1)
  np.testing.assert_allclose(largest, x / np.abs(x).max(), rtol=1e-6)
  np.testing.assert_array_equal(normalizer.normalize(normalizer.fit(x, "none"), x), x)


def test_percentiles_of_each_step():
  """Of a straight line of 1001 numbers they are 0.3 and 99.7 % of the way."""
  line = np.linspace(0, 1, 1001)
  x = np.stack([line, 10 * line + 3], 1)[..., None].astype(np.float32)
  affine = normalizer.fit(x, "percentile")
  low, high = affine.centre - affine.scale, affine.centre + affine.scale
  np.testing.assert_allclose(low, [[0.003], [3.03]], atol=1e-5)
  np.testing.assert_allclose(high, [[0.997], [12.97]], atol=1e-5)


def test_a_saved_normalizer_is_the_same(npz, tmp_path):
  source = trajectories.build(path=npz(), action_range="percentile")
  path = str(tmp_path / "normalizer.npz")
  normalizer.save(path, source.normalizer)
  again = trajectories.metadata_only(normalizer.load(path))
  jax.tree.map(np.testing.assert_array_equal, again.normalizer, source.normalizer)
  for name in ("shape", "cond", "num_classes"):
    assert getattr(again, name) == getattr(source, name)
  with pytest.raises(ValueError, match="the episodes are not here"):
    again[np.arange(2)]
  stored = workdir_lib.stored_normalizer(str(tmp_path))
  assert normalizer.allclose(stored, source.normalizer)
  # A work directory of an earlier version.
  (tmp_path / "normalizer.npz").rename(tmp_path / "normaliser.npz")
  stored = workdir_lib.stored_normalizer(str(tmp_path))
  jax.tree.map(np.testing.assert_array_equal, stored, source.normalizer)
  (tmp_path / "normalizer.npz").write_bytes(b"no")
  with pytest.raises(UserError, match="normalizer.npz is no normalizer, or damaged"):
    normalizer.load(path)


# Files.


def test_pusht(tmp_path):
  """Diffusion Policy's replay: format 2, chunked, compressed by blosc."""
  keypoint, state = RNG.normal(size=(N, 9, 2)), RNG.normal(size=(N, 5))
  arrays = {"data/keypoint": keypoint, "data/state": state}
  arrays |= {"data/action": ARRAYS["action"], "meta/episode_ends": ENDS}
  path = tmp_path / "pusht_cchi_v7_replay.zarr"
  group = zarr.open_group(str(path), mode="w", zarr_format=2)
  blosc = numcodecs.Blosc(cname="lz4", clevel=5, shuffle=numcodecs.Blosc.SHUFFLE)
  for name, x in arrays.items():
    x = x if name.startswith("meta") else x.astype(np.float32)
    chunks = (25, *x.shape[1:])
    made = group.create_array(
      name, shape=x.shape, chunks=chunks, dtype=x.dtype, compressors=blosc
    )
    made[:] = x
  assert json.loads((path / "data/state/.zarray").read_text())["zarr_format"] == 2
  found = read(path)
  assert found.observation.shape == (N, 20)
  np.testing.assert_allclose(
    found.observation[:, :18], keypoint.reshape(N, 18), rtol=1e-6
  )
  np.testing.assert_allclose(found.observation[:, 18:], state[:, :2], rtol=1e-6)
  np.testing.assert_array_equal(found.action, ARRAYS["action"])
  np.testing.assert_array_equal(found.ends, ENDS)
  chunk = path / "data/action/1.0"
  chunk.write_bytes(b"no")
  with pytest.raises(UserError, match="cannot be read .*; download it again"):
    read(path)


def square(path, absolute: bool = False, **changed) -> dict:
  """Writes a file in robomimic's layout, and returns its arrays by demonstration."""
  sizes = dict(zip(robomimic.KEYS, (14, 3, 4, 2), strict=True))
  demos = {}
  with h5py.File(path, "w") as file:
    for k, n in enumerate((4, 9, 2) + (3,) * 8):  # demo_10 is after demo_9
      obs = {name: RNG.normal(size=(n, d)) for name, d in sizes.items()}
      demos[k] = {"obs": obs, "actions": RNG.normal(size=(n, 7))} | changed
      for name, x in demos[k]["obs"].items():
        file[f"data/demo_{k}/obs/{name}"] = x
      file[f"data/demo_{k}/actions"] = demos[k]["actions"]
  return demos


def test_square(tmp_path):
  path = tmp_path / "low_dim.hdf5"
  demos = square(path)
  found = read(path)
  parts = [
    np.concatenate([d["obs"][k] for k in robomimic.KEYS], 1) for d in demos.values()
  ]
  np.testing.assert_allclose(found.observation, np.concatenate(parts), rtol=1e-6)
  assert found.observation.shape[1] == 23
  actions = np.concatenate([d["actions"] for d in demos.values()])
  np.testing.assert_allclose(found.action, actions, rtol=1e-6)
  np.testing.assert_array_equal(found.ends, np.cumsum([len(p) for p in parts]))
  poses = reader.read(str(path), keys=("object",), absolute=True)
  assert (poses.observation.shape[1], poses.action.shape[1]) == (14, 10)
  np.testing.assert_allclose(poses.action[:, :3], actions[:, :3], rtol=1e-6)
  np.testing.assert_allclose(poses.action[:, 9], actions[:, 6], rtol=1e-6)


def test_rotations():
  """A quarter about z; orthonormal; the axis stays; angles add; none at 0."""
  quarter = robomimic.rotation(np.array([[0, 0, np.pi / 2]]))[0]
  np.testing.assert_allclose(quarter @ [1, 0, 0], [0, 1, 0], atol=1e-12)
  v = RNG.normal(size=(20, 3)) * 2
  R = robomimic.rotation(v)
  np.testing.assert_allclose(
    R @ R.swapaxes(-1, -2), np.tile(np.eye(3), (20, 1, 1)), atol=1e-12
  )
  np.testing.assert_allclose(np.linalg.det(R), 1)
  np.testing.assert_allclose((R @ v[..., None])[..., 0], v, atol=1e-12)
  np.testing.assert_allclose(R @ R, robomimic.rotation(2 * v), atol=1e-12)
  np.testing.assert_array_equal(robomimic.rotation(np.zeros((1, 3)))[0], np.eye(3))
  rows = robomimic.with_matrices(np.concatenate([v, v, v[:, :1]], 1))
  np.testing.assert_allclose(rows[:, 3:9], R[:, :2].reshape(20, 6), atol=1e-12)
  assert robomimic.with_matrices(np.zeros((4, 14))).shape == (4, 20)


def test_kitchen(tmp_path):
  lengths, T = (3, 7, 5), 8
  mask = (np.arange(T) < np.array(lengths)[:, None]).astype(np.float32)
  observation, action = RNG.normal(size=(3, T, 60)), RNG.normal(size=(3, T, 9))
  for name, x in zip(kitchen.FILES, (observation, action, mask), strict=True):
    np.save(tmp_path / name, x)
  found = read(tmp_path)
  np.testing.assert_array_equal(found.ends, [3, 10, 15])
  np.testing.assert_allclose(found.observation[3:10], observation[1, :7], rtol=1e-6)
  np.testing.assert_allclose(found.action[10:], action[2, :5], rtol=1e-6)
  np.save(tmp_path / kitchen.FILES[1], action[:2])
  with pytest.raises(
    UserError, match=r"actions_seq.npy \(2, 8, 9\).*; save \[E, T, 60"
  ):
    read(tmp_path)
  (tmp_path / kitchen.FILES[1]).unlink()
  with pytest.raises(UserError, match="a file is missing or damaged"):
    read(tmp_path)


def log(path, steps: int, nq: int = 30) -> np.ndarray:
  """Writes a log of MuJoCo, and returns its records."""
  sizes = {"q": nq, "v": 29, "u": 9, "mocap": 1, "sensors": 2, "user": 3}
  width = 1 + sum(sizes.values()) + 6
  records = RNG.normal(size=(steps, width)).astype("<f4")
  path.parent.mkdir(exist_ok=True)
  head = struct.pack("<7i", *sizes.values(), 4) + b"name"
  path.write_bytes(head + records.tobytes())
  return records


def test_kitchen_logs(tmp_path):
  """Every 40th record of the logs, in order of their names."""
  two = log(tmp_path / "b_task" / "1.mjl", 100)
  one = log(tmp_path / "a_task" / "2.mjl", 81)
  found = read(tmp_path)
  np.testing.assert_array_equal(found.ends, [3, 6])
  rows = np.concatenate([one[::40], two[::40]])
  np.testing.assert_array_equal(found.observation[:, :9], rows[:, 1:10])
  np.testing.assert_array_equal(found.observation[:, 9:30], rows[:, 10:31])
  np.testing.assert_array_equal(found.observation[:, 30:], 0)
  np.testing.assert_array_equal(found.action, rows[:, 60:69])
  path = tmp_path / "a_task" / "2.mjl"
  path.write_bytes(path.read_bytes()[:-5])
  with pytest.raises(
    UserError, match="2.mjl: is damaged, or not a log of Franka Kitchen"
  ):
    read(tmp_path)


def test_episodes_are_drawn_as_published():
  """206 episodes of PushT: 4 held out, 90 of the others, always the same."""
  mask = reader.split_mask(206, 0.02, 90)
  assert mask.sum() == 90
  held = ~reader.split_mask(206, 0.02, 0)
  assert held.sum() == 4
  assert not (mask & held).any()
  # numpy's own draw of seed 42, of which the published split is made.
  assert np.flatnonzero(held).tolist() == [18, 90, 134, 157]
  assert reader.split_mask(206, 0.0, 0).all()


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"action": None}, "has no action: save action [N, Da]"),
    ({"state": None}, "has no observation: save"),
    ({"episode_ends": None, "action": None}, "has no action and no episode_ends"),
    (
      {"episode_ends": np.array([5, 60.0])},
      "episode_ends float64 (2,) must be integers",
    ),
    ({"episode_ends": np.array([5, 5, 60])}, "must be integers that increase"),
    ({"episode_ends": np.array([5, 25])}, "to the 60 steps of action"),
    (
      {"state": ARRAYS["state"][:50]},
      "observation is float32 (50, 5); save floats [60",
    ),
    ({"action": ARRAYS["action"].astype(int)}, "action is int64 (60, 2); save floats"),
    ({"action": ARRAYS["action"][:, 0]}, "action is float32 (60,); save floats"),
    (
      {"frame": np.zeros((60, 2, 2))},
      "frame is float64 (60, 2, 2); save floats [60, 2,",
    ),
    (
      {"state": np.where(np.arange(60)[:, None] == 41, np.nan, ARRAYS["state"])},
      "observation is not finite at step 41; remove its episode",
    ),
  ],
)
def test_arrays_that_do_not_fit_are_refused(npz, changed, message):
  path = npz(**changed)
  with pytest.raises(UserError) as caught:
    read(path)
  assert message in str(caught.value)
  assert path in str(caught.value)


def test_files_that_do_not_fit_are_refused(tmp_path):
  with pytest.raises(ValueError, match="path='': name a file"):
    trajectories.build()
  with pytest.raises(ValueError, match="path='.*none': does not exist"):
    read(tmp_path / "none")
  with pytest.raises(UserError, match="has no .zgroup, no observations_seq.npy"):
    read(tmp_path)
  for name in ("a.npz", "a.hdf5"):
    (tmp_path / name).write_bytes(b"no")
    with pytest.raises(UserError, match=f"{name}:? is .*damaged"):
      read(tmp_path / name)
  square(tmp_path / "b.hdf5", actions=RNG.normal(size=(1, 7)))
  with pytest.raises(UserError, match="demo_0: 4 observations, 1 actions"):
    read(tmp_path / "b.hdf5")
  square(tmp_path / "c.hdf5")
  with pytest.raises(UserError, match="obs of image .*image"):
    reader.read(str(tmp_path / "c.hdf5"), keys=("image",), absolute=False)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"horizon": 80}, "horizon=80: no episode .* the longest has 35"),
    ({"horizon": 1}, "horizon=1: must hold n_obs_steps=2"),
    ({"std": -1.0}, "std=-1.0: must be at least 0"),
    ({"action_range": "best"}, "action_range='best': must be one of range, percentile"),
  ],
)
def test_fields_that_do_not_fit_are_refused(npz, fields, message):
  with pytest.raises(ValueError, match=message):
    trajectories.build(path=npz(), **fields)


# Jobs.


def config(path: str, **fields):
  c = configs.base()
  c.data = configs.component(
    "data", "trajectories", path=path, horizon=4, n_action_steps=2
  )
  c.model.update(width=16, depth=1, embed=16)
  c.train.update(steps=2, batch_size=8, log_every=1)
  c.update_from_flattened_dict(fields)
  return c


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"train.flip": True}, "config.train.flip=True: needs images"),
    ({"model.guidance": True}, "config.loss.guidance=True: needs images"),
    ({"train.sample_every": 1}, "config.data are trajectories, not images"),
    (
      {"model": configs.component("models", "dit")},
      "patch=2: must divide height and",
    ),
  ],
)
def test_what_is_for_images_is_refused(npz, tmp_path, fields, message):
  with pytest.raises(UserError, match=message):
    train.run(config(npz(), **fields), str(tmp_path / "run"))


@pytest.mark.slow
def test_a_policy_is_trained_and_distilled(npz, tmp_path):
  """Its work directory needs no data; a student starts as its teacher."""
  path, teacher, student = npz(), str(tmp_path / "t"), str(tmp_path / "s")
  train.run(config(path), teacher)
  c = config(path)
  c.loss = configs.component("losses", "scm", velocity="teacher", warmup_steps=0)
  c.teacher.workdir = c.init_from = teacher
  c.optim.learning_rate = 1e-12
  train.run(c, student)
  (tmp_path / "episodes.npz").unlink()
  (one, p), (two, q) = (workdir_lib.trained(c, d) for d in (teacher, student))
  assert one.dataset.cond["observation"].shape == (10,)
  jax.tree.map(
    np.testing.assert_array_equal, one.dataset.normalizer, two.dataset.normalizer
  )
  x, t = jnp.ones((3, 4, 2)), jnp.full(3, 0.7)
  seen = jnp.asarray(RNG.normal(size=(3, 10)), jnp.float32)
  F = one.network.apply(p, x, t, {"observation": seen})
  np.testing.assert_allclose(
    two.network.apply(q, x, t, {"observation": seen}), F, atol=1e-6
  )
  moved = one.network.apply(p, x, t, {"observation": seen + 1})
  assert jnp.abs(moved - F).max() > 0
