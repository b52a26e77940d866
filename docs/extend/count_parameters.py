"""A job: counts the parameters of the network that a config describes."""

import dataclasses

import jax

from sdiff_jax import registry
from sdiff_jax.experiment import build as experiments
from sdiff_jax.fields import Positive


@dataclasses.dataclass(frozen=True)
class CountParameters:
  """How parameters are counted.

  Attributes:
    unit: number of parameters that the result is a multiple of.
  """

  unit: Positive = 1.0


@registry.register(
  "jobs", "count_parameters", sections={"count_parameters": CountParameters}
)
def run(config, workdir):
  """Prints the number of parameters, in units of config.count_parameters.unit."""
  del workdir
  experiment = experiments.build(config)
  params = jax.eval_shape(experiment.network.init, jax.random.key(0))["net"]
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  return f"{count / config.count_parameters.unit:g} parameters"
