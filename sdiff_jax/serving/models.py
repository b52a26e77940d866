"""What is served: the lanes of each model, and what its requests may ask for."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np

from sdiff_jax.serving.lanes import Lane, Rows

# Begin of the window [B], and denoised values there [B, ...] (see `samplers.Callback`).
Listener = Callable[[np.ndarray, np.ndarray], None]


class Key(NamedTuple):
  """What a lane computes.

  Attributes:
    sampler: name of the sampler.
    steps: number of its steps.
    guided: whether each sample has a scale of classifier-free guidance.
    max_passes: bound of the sequential calls of the network; 0 for none.
  """

  sampler: str
  steps: int
  guided: bool = False
  max_passes: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Live:
  """A sampler whose passes are watched, and the same steps one by one.

  Attributes:
    key: of the lane that computes the same without an audience.
    sequential: the key of the lane of the sequential sampler.
    window: number of steps that a pass evaluates.
    evaluations: number of steps in all.
    watch: (window, inputs of one row, listener) -> outputs; the window is `window`, or
      1 for the sequential sampler.
    pictures: denoised values [B, ...] -> images uint8 [B, H, W, C].
  """

  key: Key
  sequential: Key
  window: int
  evaluations: int
  watch: Callable[[int, Rows, Listener], Rows]
  pictures: Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A model that is served.

  Attributes:
    name: how requests call it.
    title: kind of the model, such as "sCD".
    makes: what it makes.
    lanes: what is compiled; the first one is the default.
    rows: seeds int32 [n], classes int32 [n] or None, prompts or None, and guidance
      scale -> inputs of a lane; for actions, seeds and states.
    num_classes: number of classes; 0 for none.
    label_name: name of the input that is the class.
    takes_prompt: whether images have a prompt.
    shape: of an image [H, W, C], or of the states of a robot [K, S].
    live: samplers to be watched; None for none.
  """

  name: str
  title: str
  makes: Literal["images", "actions"]
  lanes: Mapping[Key, Lane]
  rows: Callable[..., Rows]
  num_classes: int = 0
  label_name: str = "label"
  takes_prompt: bool = False
  shape: tuple[int, ...] = ()
  live: Live | None = None

  def labels(self, rows: Rows) -> np.ndarray:
    """Returns the classes of rows, int32 [n]; 0 without classes.

    Args:
      rows: inputs of a lane.
    """
    if self.label_name in rows:
      return np.maximum(rows[self.label_name].reshape(len(rows["seeds"]), -1)[:, 0], 0)
    return np.zeros(len(rows["seeds"]), np.int32)

  @property
  def default(self) -> Key:
    """The key of the lane of a request that names no sampler."""
    return next(iter(self.lanes))

  @property
  def takes_guidance(self) -> bool:
    """Whether a request may have a scale of classifier-free guidance."""
    return any(key.guided for key in self.lanes)
