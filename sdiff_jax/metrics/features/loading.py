"""Networks of features by the words of a config: inception:PATH,dinov2:PATH."""

import functools

from sdiff_jax.metrics.features import classifier, dinov2, inception
from sdiff_jax.metrics.features.base import FeatureNetwork
from sdiff_jax.types import UserError

FEATURE_NETWORKS = {
  "inception": inception.load,
  "pytorch-fid": functools.partial(inception.load, pixels=inception.pytorch_fid),
  "dinov2": dinov2.load,
}


def load(names: str) -> list[FeatureNetwork]:
  """Returns the networks of kind:path words with commas between them.

  A word without a kind names a shipped classifier, or an .npz of one.

  Raises:
    UserError: a file is missing or does not fit, or two networks are of one metric.
  """
  networks = []
  for name in names.split(","):
    kind, _, path = name.partition(":")
    networks.append(
      FEATURE_NETWORKS[kind](path)
      if kind in FEATURE_NETWORKS
      else classifier.load(name)
    )
  metrics = [network.metric for network in networks]
  if len({*metrics}) < len(metrics):
    raise UserError(f"config.evaluate.features={names}: two networks of one metric")
  return networks
