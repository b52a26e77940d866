"""Feature networks, each registered by one module.

`config.evaluate.features` names them as NAME:PATH, several with commas between them; a
name alone is a shipped classifier or the file of one. A module registers a loader,

  @registry.register(
    "metrics.features",
    "inception",
    columns={"fid": ("FID", "{:.2f}", "Frechet distance in features of Inception-v3")},
  )
  def load(path: str) -> FeatureNetwork: ...

whose fact `columns` says how reports show the Frechet distance in its features: key of
the value (`FeatureNetwork.metric`) -> (header, format, description).
"""

from sdiff_jax import registry
from sdiff_jax.metrics.features._base import (
  FeatureExtractor,
  FeatureNetwork,
  actual_batch_size,
  digest,
  shard_extractor,
)

__all__ = [
  "FeatureExtractor",
  "FeatureNetwork",
  "actual_batch_size",
  "digest",
  "load",
  "shard_extractor",
]
DEFAULT = "classifier"  # the network of a name without a path


def load(names: str) -> list[FeatureNetwork]:
  """Returns feature networks.

  Args:
    names: NAME:PATH, several with commas between them; or what `classifier.load` takes.

  Raises:
    ValueError: two networks have the same metric.
    UserError: there is no such network, or its file is missing or damaged.
  """
  networks = []
  for word in names.split(","):
    name, separator, path = word.partition(":")
    if not separator and name not in registry.names("metrics.features"):
      name, path = DEFAULT, word
    if separator and not path:
      raise ValueError(f"features={names!r}: name a file after {name}:")
    networks.append(registry.lookup("metrics.features", name).build(path))
  metrics = [network.metric for network in networks if network.metric]
  if len({*metrics}) < len(metrics):
    raise ValueError(
      f"features={names}: two networks have the same metric, {', '.join(metrics)}"
    )
  return networks
