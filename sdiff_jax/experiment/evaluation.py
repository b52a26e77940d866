"""What samples are measured in, and against: networks of features, real images."""

import json
from collections.abc import Callable, Iterable

import jax
import ml_collections
import numpy as np
import tqdm
from jax.sharding import Mesh

from sdiff_jax import registry
from sdiff_jax.data import folder, npz, pipeline
from sdiff_jax.distributed import sharding
from sdiff_jax.io import image_io
from sdiff_jax.metrics import frechet, reference_statistics, streaming
from sdiff_jax.metrics.features import clip, loading
from sdiff_jax.metrics.features.base import (
  FeatureExtractor,
  FeatureNetwork,
  shard_extractor,
)
from sdiff_jax.metrics.reference_statistics import Reference
from sdiff_jax.types import UserError

PROBE = 64  # images that tell data sets apart
Network = tuple[FeatureNetwork, FeatureExtractor]
# (batches of images, their number) -> distances and shares by name.
MetricFn = Callable[[Iterable[streaming.Images], int], dict[str, float]]


def networks(
  config: ml_collections.ConfigDict, mesh: Mesh, shape: tuple[int, ...]
) -> list[Network]:
  """Returns the networks of evaluate.features and their runs over the devices.

  Args:
    config: of the experiment.
    mesh: of the devices.
    shape: of an image, [H, W, C].

  Raises:
    UserError: a file is missing or does not fit, or the network is for other images.
  """
  found = loading.load(config.evaluate.features)
  for network in found:
    _width(network, shape)
  return [(n, shard_extractor(n, mesh, config.evaluate.batch_size)) for n in found]


def real(config: ml_collections.ConfigDict) -> pipeline.Dataset | None:
  """Returns the images to compare with, or None where there are statistics alone.

  They are those of config.reference or else of config.data; beside statistics, those
  of the same file, which ADM's have for precision and recall.
  """
  path = config.evaluate.reference
  if path:
    return npz.build(path=path) if path.endswith(".npz") and _images(path) else None
  section = config.reference if config.reference.name else config.data
  source = registry.build("data", section.to_dict())
  pipeline.check_pixels(source)
  return source


def dataset_images(source: pipeline.Dataset) -> streaming.Images:
  """Returns all images of a source, read as they are needed."""
  return lambda rows: source.take(rows)[0], source.size


def array_images(images: np.ndarray) -> streaming.Images:
  """Returns images uint8 [N, H, W, C]."""
  return images.__getitem__, len(images)


def metric_fn(
  config: ml_collections.ConfigDict,
  mesh: Mesh,
  against: pipeline.Dataset | None,
  shape: tuple[int, ...],
) -> MetricFn:
  """Returns the measure of images [H, W, C] against real ones.

  Statistics of real images are those of evaluate.reference, or are kept between runs.
  Precision and recall are those in the features of the first network.

  Raises:
    UserError: files that do not fit, from here, or too few images, from the measure.
  """
  found, keep = networks(config, mesh, shape), config.evaluate.pr_num_images
  widths = [_width(network, shape) for network, _ in found]
  statistics = [_statistics(config, *x) for x in zip(found, widths, strict=True)]
  known = []
  for one, width, given in zip(found, widths, statistics, strict=True):
    if against is None or (given and not keep):
      made = Reference(*given, np.zeros((0, width), np.float32))
    else:
      made = _known(mesh, one, against, keep)
    known.append(made._replace(**given._asdict()) if given else made)
  known[1:] = [k._replace(features=k.features[:0]) for k in known[1:]]

  def measure(batches: Iterable[streaming.Images], size: int) -> dict[str, float]:
    out = {}
    summaries = streaming.summarize(found, batches, size, keep)
    for (network, _), made, theirs in zip(found, summaries, known, strict=True):
      out |= reference_statistics.measure(network.metric, made, theirs)
    return out

  return measure


def clip_score(
  config: ml_collections.ConfigDict, mesh: Mesh, source: pipeline.Dataset, dir: str
) -> float:
  """Returns the CLIP score of images that the job `generate` made.

  Args:
    config: evaluate.clip is the folder of the networks.
    mesh: of the devices.
    source: of the images.
    dir: their folder, whose files hold the prompts.

  Raises:
    UserError: a file holds no prompt, or the networks are missing or damaged.
  """
  prompts = []
  for path in folder.files(dir):
    try:
      prompts.append(json.loads(image_io.about(path))["prompt"])
    except (*folder.UNREADABLE, KeyError, TypeError) as error:
      raise UserError(
        f"{path} holds no prompt: the CLIP score is of images of the job generate"
      ) from error
  networks = clip.load(config.evaluate.clip)
  extract = shard_extractor(networks.image, mesh, config.evaluate.batch_size)
  images = np.concatenate([*extract(*dataset_images(source))])
  return clip.score(images, networks.text(prompts))


def _statistics(
  config: ml_collections.ConfigDict, one: Network, width: int
) -> frechet.Statistics | None:
  """Returns what evaluate.reference says of a network's features, if it is given."""
  path, metric = config.evaluate.reference, one[0].metric
  if not path:
    return None
  given = reference_statistics.read(path, metric)
  if len(given.mean) != width:
    raise UserError(
      f"{path} has statistics of {len(given.mean)} features, {metric} has {width}: they"
      " are of another network"
    )
  return given


def _known(mesh: Mesh, one: Network, source: pipeline.Dataset, keep: int) -> Reference:
  """Returns what a network's features of all real images are, kept between runs."""
  _width(one[0], source.shape)
  # Data and features are told apart by a few images and what is made of them.
  probe = source.take(np.linspace(0, source.size - 1, PROBE).astype(int))[0]
  (features,) = streaming.summarize([one], [array_images(probe)], PROBE, PROBE)
  key = [str((source.size, source.shape, keep)).encode(), probe.tobytes()]
  return reference_statistics.cached(
    [*key, np.concatenate(features.kept).tobytes()],
    lambda: reference_statistics.of(summary_of(one, source, keep)),
    # The network runs on all processes, or on none.
    lambda mine: bool(sharding.all_processes(np.array([mine]), mesh)[0]),
  )


def summary_of(
  one: Network, source: pipeline.Dataset, keep: int
) -> streaming.StreamingMoments:
  """Returns a network's summary of all images of a source, with a progress bar."""
  network, extract = one
  take, size = dataset_images(source)

  def shown(take: Callable, size: int) -> Iterable[np.ndarray]:
    with tqdm.tqdm(total=size, desc=network.metric, disable=None, leave=False) as bar:
      for features in extract(take, size):
        yield features
        bar.update(len(features))

  return streaming.summarize([(network, shown)], [(take, size)], size, keep)[0]


def _width(network: FeatureNetwork, shape: tuple[int, ...]) -> int:
  """Returns the number of features of images [H, W, C].

  Raises:
    UserError: the network is for other images.
  """
  images = jax.ShapeDtypeStruct((1, *shape), np.uint8)
  try:
    return jax.eval_shape(network.apply, network.params, images).shape[-1]
  except ValueError as error:
    raise UserError(f"config.evaluate.features: {error}") from error


def _images(path: str) -> bool:
  """Returns whether an .npz has images beside its statistics."""
  try:
    with np.load(path) as arrays:
      return "arr_0" in arrays.files
  except Exception:  # which `reference.read` tells of
    return False
