"""Networks of features: what metrics know of them, and their run over all devices."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from sdiff_jax.distributed import sharding
from sdiff_jax.types import Array, Params

SHARE = 64  # images a device takes at a time, at most


class FeatureNetwork(NamedTuple):
  """A network from images to the features that a metric compares.

  Attributes:
    metric: the Frechet distance in these features, as results name it.
    apply: (params, images uint8 [B, H, W, C]) -> features float32 [B, D]; raises
      ValueError for images that it is not made for.
    params: its weights, on the host.
    head: features to logits of classes for the Inception score, float32 [D, K], or
      None.
  """

  metric: str
  apply: Callable[[Params, Array], Array]
  params: Params
  head: np.ndarray | None = None


# (take: rows int [n] -> images uint8 [n, H, W, C], number of images) -> features of the
# images, float32 [N, D], a batch at a time.
FeatureExtractor = Callable[
  [Callable[[np.ndarray], np.ndarray], int], Iterator[np.ndarray]
]


def shard_extractor(
  network: FeatureNetwork, mesh: Mesh, batch_size: int
) -> FeatureExtractor:
  """Returns the network's run over the devices of a mesh.

  A process takes the rows of its own devices alone; all get the features of all rows.
  The images of the next batch are read while the devices are at this one.

  Args:
    network: of features.
    mesh: its devices share every batch.
    batch_size: images in a batch over all devices, about, and at most.
  """
  over, everywhere = sharding.batch(mesh), sharding.replicated(mesh)
  share = min(max(batch_size // mesh.size, 1), SHARE)
  batch, mine = share * mesh.size, sharding.rows(over, share * mesh.size)
  params = jax.device_put(network.params, everywhere)
  apply = jax.jit(
    sharding.with_mesh(mesh, network.apply),
    in_shardings=(everywhere, over),
    out_shardings=everywhere,
  )

  def extract(
    take: Callable[[np.ndarray], np.ndarray], size: int
  ) -> Iterator[np.ndarray]:
    before = None
    for first in range(0, size, batch):
      # A short last batch would be compiled anew: its last image fills it up.
      images = take(np.minimum(first + mine, size - 1))
      made = apply(params, sharding.make_global_batch(images, over, batch))
      if before is not None:
        yield np.asarray(before)
      before = made
    if before is not None:
      yield np.asarray(before)[: size - (size - 1) // batch * batch]

  return extract
