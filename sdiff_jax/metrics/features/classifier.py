"""Features of a small classifier of small images, trained on the same data.

The job `features` trains such classifiers; those of two data sets ship with the package.
"""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from sdiff_jax import registry
from sdiff_jax.io import array_io, bounded, file_io, storage
from sdiff_jax.io.progress import Progress
from sdiff_jax.io.snapshot import Snapshot
from sdiff_jax.metrics.features._base import FeatureNetwork
from sdiff_jax.types import Array, Params, PRNGKey, PyTree, UserError

Weights = dict[str, np.ndarray]
FOLDER = pathlib.Path(__file__).parent
WIDTH = 64
MAX_SIDE = 2**13  # pixels of images that a classifier is for
BATCH = 512
CHECK_EVERY = 10  # steps after which progress is shown, and a state may be saved


class Classifier(nn.Module):
  """A convolutional classifier, which halves the image until a side is 3 or less.

  Features depend on the whole image. There are 100k parameters for 8 x 8 pixels, 400k
  for 28 x 28.

  Attributes:
    classes: number of classes.
  """

  classes: int

  @nn.compact
  def __call__(self, x: Array) -> tuple[Array, Array]:
    """Maps images in [-1, 1], [B, H, W, C], to ([B, WIDTH], [B, classes])."""
    x = nn.silu(nn.Conv(32, (3, 3))(x))
    width = 64
    while min(x.shape[1:3]) > 3:
      x = nn.silu(nn.Conv(width, (3, 3), strides=2)(x))
      width = 128
    features = nn.silu(nn.Dense(WIDTH, name="features")(x.mean(axis=(1, 2))))
    return features, nn.Dense(self.classes, name="logits")(features)


def fit(
  images: np.ndarray,
  labels: np.ndarray,
  classes: int,
  *,
  seed: int = 0,
  steps: int = 2000,
  batch_size: int = 128,
  progress: bool = True,
  snapshot: Snapshot | None = None,
) -> Weights:
  """Trains a classifier, and determines the scale of its features.

  Adam with a cosine schedule. Augmentation and smoothed labels keep the features from
  collapsing to the classes.

  Args:
    images: uint8 [N, H, W, C].
    labels: int [N], from 0 to classes - 1.
    classes: number of classes.
    seed: of initialization, batches and augmentation.
    steps: number of training steps.
    batch_size: images in a batch.
    progress: whether to show progress.
    snapshot: where the state is saved now and then, and resumed from; None for nowhere.

  Returns:
    Parameters in float16, keyed "layer/name"; "scale", by which features are multiplied
    so that their covariance has trace WIDTH; "image_shape" [3].

  Raises:
    ValueError: images are not uint8 [N, H, W, C], or labels do not fit them.
  """
  if images.dtype != np.uint8 or images.ndim != 4:
    raise ValueError(
      f"images: must be uint8 [N, H, W, C], got {images.dtype} {list(images.shape)}"
    )
  if (
    labels.shape != images.shape[:1] or not 0 <= labels.min() <= labels.max() < classes
  ):
    raise ValueError(f"labels: must be {len(images)} integers from 0 to {classes - 1}")
  key_init, key_steps = jax.random.split(jax.random.key(seed))
  net = Classifier(classes)
  params = net.init(key_init, jnp.zeros((1, *images.shape[1:])))["params"]
  optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, steps))

  def loss(params: Params, x: Array, labels: Array) -> Array:
    _, logits = net.apply({"params": params}, x)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, classes), 0.1)
    return optax.softmax_cross_entropy(logits, targets).mean()

  @jax.jit
  def step(params, moments, key, images, labels):
    key_batch, key_augment = jax.random.split(key)
    indices = jax.random.randint(key_batch, (batch_size,), 0, len(images))
    x = _augment(key_augment, _center(images[indices]))
    gradient = jax.grad(loss)(params, x, labels[indices])
    # Adam's bias correction is float ** int32, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
      updates, moments = optimizer.update(gradient, moments)
    return optax.apply_updates(params, updates), moments

  state = params, optimizer.init(params)
  first, state = _resume(snapshot, state)
  data = jax.device_put((images, labels))
  with Progress(
    steps, label="classifier", unit="step", initial=first, active=progress
  ) as shown:
    for i in range(first, steps):
      state = step(*state, jax.random.fold_in(key_steps, i), *data)
      if (i + 1) % CHECK_EVERY == 0 or i + 1 == steps:
        jax.block_until_ready(state)
        shown.show(i + 1)
        if snapshot is not None:
          snapshot.save(lambda done=i + 1, state=state: _arrays(done, state))
  params, _ = state

  flat = traverse_util.flatten_dict(jax.device_get(params), sep="/")
  weights = {name: value.astype(np.float16) for name, value in flat.items()}
  weights |= {"scale": np.float32(1), "image_shape": np.array(images.shape[1:])}
  # The scale is that of the parameters in float16, which are returned.
  variance = predict(weights, images)[0].var(axis=0, ddof=1, dtype=np.float64)
  return weights | {"scale": np.float32(np.sqrt(WIDTH / variance.sum()))}


def _arrays(done: int, state: PyTree) -> dict[str, np.ndarray]:
  """Returns the state after some steps as named arrays."""
  leaves = jax.device_get(jax.tree.leaves(state))
  return {"done": np.array(done)} | {f"leaf{k}": x for k, x in enumerate(leaves)}


def _resume(snapshot: Snapshot | None, state: PyTree) -> tuple[int, PyTree]:
  """Returns a number of steps and the state after them: stored, or 0 and the first."""
  if snapshot is None or not snapshot.arrays:
    return 0, state
  leaves, treedef = jax.tree.flatten(state)
  stored = [snapshot.arrays.get(f"leaf{k}") for k in range(len(leaves))]
  if any(x is None or x.shape != y.shape for x, y in zip(stored, leaves, strict=True)):
    return 0, state
  state = jax.device_put(jax.tree.unflatten(treedef, stored))
  return int(snapshot.arrays["done"]), state


def predict(weights: Weights, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Computes features and logits, in batches of one size.

  Args:
    weights: as fit returns them.
    images: uint8 [N, H, W, C].

  Returns:
    Features, float32 [N, WIDTH], and logits, float32 [N, classes].

  Raises:
    ValueError: images are not uint8 of the shape that the weights were trained on.
  """
  _check(weights, images)
  params = {k: v for k, v in weights.items() if k not in ("scale", "image_shape")}
  params = jax.device_put(params)
  outputs = []
  for start in range(0, len(images), BATCH):
    batch = images[start : start + BATCH]
    # The last batch is padded: another size would be compiled.
    padded = np.pad(batch, [(0, BATCH - len(batch)), (0, 0), (0, 0), (0, 0)])
    output = jax.device_get(_forward(params, jax.device_put(padded)))
    outputs.append([array[: len(batch)] for array in output])
  features, logits = (np.concatenate(arrays) for arrays in zip(*outputs, strict=True))
  return features * weights["scale"], logits


def save(path: str | pathlib.Path, weights: Weights) -> None:
  """Writes weights to an .npz file."""
  file_io.write_npz(path, **weights)


@registry.register(
  "metrics.features",
  "classifier",
  columns={
    "frechet": (
      "Frechet",
      "{:.2f}",
      "Frechet distance to real images, lower is better; in features of the small "
      "classifier that ships with sdiff_jax, scaled to trace 64: not comparable with FID",
    )
  },
)
def load(path: str | pathlib.Path) -> FeatureNetwork:
  """Returns a classifier as a feature network.

  Args:
    path: of an .npz file that `save` wrote, or the name of a classifier that ships with
      the package, "digits" or "fashion".

  Raises:
    UserError: there is no such file, it is damaged, or it holds no such weights.
  """
  file = storage.of(path)
  if file.suffix != ".npz":
    file = FOLDER / f"{path}.npz"
  if not storage.lexists(file):
    shipped = ", ".join(sorted(f.stem for f in FOLDER.glob("*.npz")))
    raise UserError(
      f"features={bounded.short(path)!r} not found: must be a shipped classifier ({shipped}) or an "
      ".npz file that --job=features wrote"
    )
  weights = array_io.read_npz(file)
  try:
    _check_weights(weights)
  except ValueError as error:
    raise UserError(f"{file} holds no classifier: {error}") from None

  def apply(params: Params, images: Array) -> Array:
    _check(weights, images)
    params = dict(params)
    scale = params.pop("scale")
    return _forward(params, images)[0] * scale

  params = {k: v for k, v in weights.items() if k != "image_shape"}
  return FeatureNetwork("frechet", apply, params)


def _check_weights(weights: Weights) -> None:
  """Raises a ValueError unless the arrays are weights of a `Classifier`."""
  missing = {"image_shape", "scale", "logits/bias"} - weights.keys()
  if missing:
    raise ValueError(f"it has no {', '.join(sorted(missing))}")
  shape, scale = weights["image_shape"], weights["scale"]
  if shape.shape != (3,) or shape.dtype.kind not in "iu":
    raise ValueError(f"image_shape is {shape.dtype} {shape.shape}, not three integers")
  if not (shape.min() > 0 and shape.max() <= MAX_SIDE):
    raise ValueError(f"image_shape is {shape.tolist()}; sides are 1 to {MAX_SIDE}")
  if scale.shape != () or scale.dtype.kind != "f" or not 0 < scale < np.inf:
    raise ValueError(f"scale is {bounded.short(scale, 40)}, not a number above 0")
  net = Classifier(weights["logits/bias"].size)
  image = jax.ShapeDtypeStruct((1, *shape.tolist()), jnp.float32)
  expected = jax.eval_shape(net.init, jax.random.key(0), image)["params"]
  shapes = {
    name: leaf.shape
    for name, leaf in traverse_util.flatten_dict(expected, sep="/").items()
  }
  arrays = {k: x for k, x in weights.items() if k not in ("scale", "image_shape")}
  for name in sorted(shapes.keys() | arrays.keys()):
    x = arrays.get(name)
    if x is None or name not in shapes:
      raise ValueError(
        f"{bounded.short(name, 60)} is {'missing' if x is None else 'no weight'}"
      )
    if x.shape != shapes[name] or x.dtype.kind != "f":
      raise ValueError(f"{name} is {x.dtype} {x.shape}, not floats {shapes[name]}")
    if not np.isfinite(x).all():
      raise ValueError(f"{name} is not finite")


def _check(weights: Weights, images: Array) -> None:
  """Raises a ValueError unless images have the shape of the training images."""
  shape = weights["image_shape"].tolist()
  if images.dtype != np.uint8 or list(images.shape[1:]) != shape:
    raise ValueError(
      f"images: must be uint8 [N, {', '.join(map(str, shape))}], got "
      f"{images.dtype} {list(images.shape)}"
    )


@jax.jit
def _forward(params: dict[str, Array], images: Array) -> tuple[Array, Array]:
  params = {name: value.astype(jnp.float32) for name, value in params.items()}
  net = Classifier(params["logits/bias"].size)
  params = traverse_util.unflatten_dict(params, sep="/")
  return net.apply({"params": params}, _center(images))


def _center(images: Array) -> Array:
  """Maps uint8 to float32 in [-1, 1]."""
  return images.astype(jnp.float32) / 127.5 - 1


def _augment(key: PRNGKey, x: Array) -> Array:
  """Shifts each image by up to one pixel and adds weak noise; x [B, H, W, C]."""
  key_shift, key_noise = jax.random.split(key)
  shifts = jax.random.randint(key_shift, (len(x), 2), 0, 3)
  padded = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="edge")
  shifted = jax.vmap(
    lambda image, s: jax.lax.dynamic_slice(image, (s[0], s[1], 0), x.shape[1:])
  )(padded, shifts)
  return shifted + 0.05 * jax.random.normal(key_noise, x.shape)
