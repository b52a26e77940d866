"""Training objectives: each public module of this package registers one.

A loss is a file with a function that returns a `types.LossFn`, registered by

    @registry.register("losses", "my_loss", title=..., family=..., needs_teacher=...)
    def build(*, network, sigma_d, teacher=None, p_mean=-1.0, ...): ...

Its arguments with a default are its fields in a config (see `registry`). The keyword
arguments of `register` are facts about the loss, which `facts` reads.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from sdiff_jax import registry
from sdiff_jax.losses._tangent import (
  TANGENT_NORMALIZERS,
  ConsistencyOptions,
  normalize_tangent,
  tangent_norm,
)
from sdiff_jax.types import CondSpecs, Json, Params

__all__ = [
  "TANGENT_NORMALIZERS",
  "ConsistencyOptions",
  "Facts",
  "facts",
  "normalize_tangent",
  "tangent_norm",
]


class Facts(NamedTuple):
  """What a loss says of the models that it trains.

  Attributes:
    title: name of such a model in tables and reports, such as "sCD".
    description: a sentence about such a model for reports, or "".
    family: "diffusion" (a denoiser, sampled in many steps) or "consistency" (sampled in
      one or a few).
    needs_teacher: whether the loss distills a teacher network.
    init_extra_params: maps the parameters of the network to those that are trained,
      with the parameters of further networks.
    cond: what the network is conditioned on beside the conditions of the data set.
    takes_trajectories: whether it can be trained on stored trajectories of the teacher.
  """

  title: str
  description: str = ""
  family: str = "diffusion"
  needs_teacher: bool = False
  init_extra_params: Callable[[Params], Params] = lambda params: params
  cond: CondSpecs = MappingProxyType({})
  takes_trajectories: bool = False


def facts(section: Mapping[str, Json]) -> Facts:
  """Returns the facts of the loss that a section names.

  A fact may be registered as a value, or as a function of the section's fields.

  Args:
    section: {"name": ..., field: value}, of a config.

  Returns:
    The facts. Those that the loss does not register have their defaults; its title is
    then its name.

  Raises:
    UserError: no loss has that name.

  Example:
    >>> facts({"name": "scm", "velocity": "data"}).title
    'sCT'
  """
  registered = registry.lookup("losses", section["name"]).facts
  values = {"title": section["name"], **registered}
  for name in ("title", "description", "family", "needs_teacher", "cond"):
    if callable(values.get(name)):
      values[name] = values[name](section)
  return Facts(**{k: v for k, v in values.items() if k in Facts._fields})


__getattr__ = functools.partial(registry.public_module, __name__)
