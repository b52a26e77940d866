"""What a feature network is, and how it runs on all devices."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from sdiff_jax.distributed import sharding
from sdiff_jax.types import Array, Params

MAX_BATCH_PER_DEVICE = 64


class FeatureNetwork(NamedTuple):
  """A network from images to the features that metrics compare.

  Attributes:
    metric: key of the Frechet distance in these features, in results and in the facts
      of the network; None if the features are not meant for distances.
    apply: (params, images uint8 [B, H, W, C]) -> features float32 [B, D]; raises
      ValueError for images that the network cannot take.
    params: its weights, on the host.
    head: matrix from features to class logits, float32 [D, K], for the Inception score;
      or None.
    text: texts -> their embeddings, float32 [N, D], for the CLIP score; or None.
  """

  metric: str | None
  apply: Callable[[Params, Array], Array]
  params: Params
  head: np.ndarray | None = None
  text: Callable[[Sequence[str]], np.ndarray] | None = None


def digest(network: FeatureNetwork) -> bytes:
  """Returns a digest of the name and the weights of a network."""
  content = hashlib.blake2b(repr(network.metric).encode())
  for path, x in jax.tree.leaves_with_path(network.params):
    x = np.ascontiguousarray(x)
    content.update(repr((jax.tree_util.keystr(path), x.shape, str(x.dtype))).encode())
    content.update(x.view(np.uint8).data if x.ndim else x.tobytes())
  return content.digest()


# (take: indices int [n] -> images uint8 [n, H, W, C], number N of images) -> features of
# the images, float32 [N, D], batch by batch.
FeatureExtractor = Callable[
  [Callable[[np.ndarray], np.ndarray], int], Iterator[np.ndarray]
]


def actual_batch_size(mesh: Mesh, batch_size: int) -> int:
  """Returns the number of images in a batch of `shard_extractor`."""
  return min(max(batch_size // mesh.size, 1), MAX_BATCH_PER_DEVICE) * mesh.size


def shard_extractor(
  network: FeatureNetwork, mesh: Mesh, batch_size: int
) -> FeatureExtractor:
  """Returns a function that runs a network on all devices of a mesh.

  Each process reads the images of its own devices; all processes receive all features.
  The next batch of images is read while the devices compute.

  Args:
    network: the feature network.
    mesh: its devices share every batch.
    batch_size: largest number of images in a batch over all devices; rounded down to
      a multiple of their number, and at most MAX_BATCH_PER_DEVICE for each.
  """
  sharded, replicated = sharding.batch(mesh), sharding.replicated(mesh)
  batch = actual_batch_size(mesh, batch_size)
  indices = sharding.rows(sharded, batch)
  params = jax.device_put(network.params, replicated)
  apply = jax.jit(
    sharding.with_mesh(mesh, network.apply),
    in_shardings=(replicated, sharded),
    out_shardings=replicated,
  )

  def extract(
    take: Callable[[np.ndarray], np.ndarray], size: int
  ) -> Iterator[np.ndarray]:
    previous = None
    for first in range(0, size, batch):
      # The last batch is padded with its last image: another size would be compiled.
      images = take(np.minimum(first + indices, size - 1))
      features = apply(params, sharding.make_global_batch(images, sharded, batch))
      if previous is not None:
        yield np.asarray(previous)
      previous = features
    if previous is not None:
      yield np.asarray(previous)[: size - (size - 1) // batch * batch]

  return extract
