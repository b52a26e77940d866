"""Diffusion policies as functions of an environment's states.

policy = policies.load("runs/pusht_scd", sampler="consistency/2")
actions = policy(states)  # [Ta, Da], to be executed in their order
"""

from typing import Any

from sdiff_jax.policies.policy import Policy, View

__all__ = ["Policy", "View", "load"]


def __getattr__(name: str) -> Any:
  # `load` reads the config of a work directory, so it belongs to the experiment layer,
  # which imports this package.
  if name != "load":
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  from sdiff_jax.experiment import policies

  return policies.load
