"""A network of a folder in the diffusers format, as a TrigFlow network.

Its process is mapped to TrigFlow by an exact change of variables, so the weights of the
folder are those of the network here.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from sdiff_jax import registry
from sdiff_jax.diffusion.trigflow import END_TIME
from sdiff_jax.fields import DType, Positive
from sdiff_jax.models.layers import common
from sdiff_jax.types import Array, Cond, CondSpecs, Network, Params, PRNGKey

ANY = 0  # size of the last axis of a condition that has no size of its own


class Pretrained(NamedTuple):
  """What is known of a network in a folder.

  Attributes:
    init: (key) -> params.
    apply: (params, x [B, H, W, C], t [B], cond) -> F [B, H, W, C].
    channels: C.
    cond: conditions that it takes, arrays of floats -> sizes of their last axes, or ANY.
    classes: number of classes of its condition "label"; 0 for none.
  """

  init: Callable[[PRNGKey], Params]
  apply: Callable[[Params, Array, Array, Cond], Array]
  channels: int
  cond: Mapping[str, int]
  classes: int = 0


class Reader(Protocol):
  """A function that reads the network of a folder."""

  def __call__(
    self,
    folder: str,
    *,
    dtype: str,
    remat: str,
    guidance: bool,
    end_time: bool,
    qk_norm: bool,
    time_scale: float,
    scan_blocks: bool,
  ) -> Pretrained:
    """Returns the network of a folder for the data of an experiment.

    Args:
      folder: in the diffusers format.
      dtype: of the hidden layers.
      remat: what a block recomputes in the backward pass.
      guidance: whether the scale of classifier-free guidance is an input.
      end_time: whether the network is a flow map.
      qk_norm: whether queries and keys are normalized.
      time_scale: factor of the timestep.
      scan_blocks: whether alike blocks run in a loop over their stacked weights.
    """
    ...


@registry.register(
  "models",
  "pretrained",
  unrolled=lambda fields: {"scan_blocks": False},
  without_remat=lambda fields: {"remat": ""},
)
def build(
  *,
  shape: tuple[int, ...],
  cond: CondSpecs,
  reader: Reader,
  folder: str = "",
  guidance: bool = False,
  qk_norm: bool = False,
  time_scale: Positive = 1.0,
  remat: common.Remat = "",
  scan_blocks: bool = False,
  dtype: DType = "float32",
) -> Network:
  """Returns the network of a folder, with a head for the adaptive weight.

  The time enters as in the folder: the timestep, a function of t, is embedded in float32,
  also where the hidden layers are narrower. There is no dropout.

  Args:
    shape: (H, W, C) of one sample.
    cond: conditions of one sample by name, as the data set declares them.
    reader: supplied by the caller, returns the network of the folder.
    folder: in the diffusers format, or hf://organization/name. A run keeps a copy of its
      config files, so that only its first start needs the folder.
    guidance: whether the scale of classifier-free guidance is an input. What the folder
      lacks for it starts at zero, and so does the end time of a flow map.
    qk_norm: whether queries and keys of attention are normalized (RMS), where the network
      of the folder has no such norm. Without it the scores of large transformers grow
      while they are distilled, and gradients of the tangent explode (SANA-Sprint,
      arXiv:2503.09641, section 3.2). It changes the function: fine-tune with it first
      (loss `diffusion`), and take that run as teacher.
    time_scale: factor of the timestep before its embedding, 0.001 for times in [0, 1] in
      place of [0, 1000]. A fast embedding makes dF/dt, a part of the tangent, large and
      training unstable (the same section). It changes the function as well.
    remat: what a block recomputes in the backward pass: "" nothing, "weights" what it
      gathers from other devices, "dots" everything
      but matrix products and convolutions, "full" everything.
    scan_blocks: whether alike blocks run in a loop over their weights, which a step
      stacks: large transformers compile many times faster, and a copy of their weights is
      held.
    dtype: dtype of the hidden layers; parameters are float32.

  Raises:
    ValueError: there is no folder, or its network is for other data or conditions.

  Example:
    >>> source = Pretrained(lambda key: {}, lambda params, x, t, cond: x, 1, {})
    >>> network = build(
    ...   shape=(4, 4, 1), cond={}, reader=lambda folder, **_: source, folder="church"
    ... )
    >>> network.apply({"net": {}}, jnp.ones((2, 4, 4, 1)), jnp.ones(2), None).shape
    (2, 4, 4, 1)
  """
  if not folder:
    raise ValueError(
      "folder='': name a folder in the diffusers format, or hf://ORG/NAME"
    )
  source = reader(
    folder,
    dtype=dtype,
    remat=remat,
    guidance=guidance,
    end_time=END_TIME in cond,
    qk_norm=qk_norm,
    time_scale=time_scale,
    scan_blocks=scan_blocks,
  )
  if len(shape) != 3 or shape[-1] != source.channels:
    raise ValueError(
      f"folder={folder}: its samples have {source.channels} channels, those of the data "
      f"the shape {tuple(shape)}"
    )
  data_cond = {name: spec for name, spec in cond.items() if name != END_TIME}
  _check_conditions(folder, source, data_cond)
  head = common.LogVar()

  def init(key: PRNGKey) -> Params:
    key_net, key_head = jax.random.split(key)
    net = source.init(key_net)
    return {"net": net, "logvar": head.init(key_head, jnp.ones((1,)))["params"]}

  def apply(
    params: Params, x: Array, t: Array, cond: Cond, *, key: PRNGKey | None = None
  ) -> Array:
    del key
    return source.apply(params["net"], x, t, cond)

  def logvar(params: Params, t: Array) -> Array:
    return head.apply({"params": params["logvar"]}, t)

  return Network(init, apply, logvar)


def _check_conditions(folder: str, source: Pretrained, cond: CondSpecs) -> None:
  """Raises a ValueError unless the conditions are those that the network takes."""
  sizes = {k: spec.shape[-1] for k, spec in cond.items() if spec.shape}
  wanted = {k: f"size {n or sizes.get(k, ANY)}" for k, n in source.cond.items()}
  found = {name: f"size {size}" for name, size in sizes.items()}
  if source.classes:
    wanted["label"] = f"{source.classes} classes"
  found |= {
    k: f"{spec.num_classes} classes" for k, spec in cond.items() if not spec.shape
  }
  for name, kind in wanted.items():
    if found.get(name) != kind:
      raise ValueError(
        f"folder={folder}: its network takes the condition {name!r} of {kind}, and that of "
        f"the data is {found.get(name, 'missing')}"
      )
  if unknown := sorted(found.keys() - wanted.keys()):
    raise ValueError(
      f"folder={folder}: its network does not take {', '.join(unknown)}, which the data "
      "or the loss have"
    )
