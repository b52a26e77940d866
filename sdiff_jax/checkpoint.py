"""Checkpoints of the training state; the only file that knows Orbax."""

import os
import sys
from typing import Any

from orbax.checkpoint import v1 as ocp

from sdiff_jax.interfaces import Params
from sdiff_jax.state import TrainState


class Checkpoints:
  """The checkpoints of a work directory; a context manager.

  Saving is asynchronous: an error of one save is raised at the next, or at the end.
  Every process calls every method.
  """

  def __init__(self, workdir: str, *, keep: int = 1):
    """Opens WORKDIR/checkpoints, keeping the newest `keep` of them."""
    self._pending = None
    self._checkpointer = ocp.training.Checkpointer(
      os.path.abspath(os.path.join(workdir, "checkpoints")),
      preservation_policy=ocp.training.preservation_policies.LatestN(keep),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exception: Any) -> None:
    self.wait()
    self._checkpointer.close()

  @property
  def latest(self) -> int | None:
    """The step of the newest checkpoint, None if there is none."""
    newest = self._checkpointer.latest
    return None if newest is None else newest.step

  def wait(self) -> None:
    """Waits for the save that is under way and raises its error, if it had one."""
    if self._pending is not None:
      self._pending, response = None, self._pending
      response.result()

  def save(self, step: int, state: TrainState) -> None:
    """Starts saving; the averages are apart, so that they can be read alone."""
    self.wait()
    training = {"params": state.params, "opt_state": state.opt_state}
    self._pending = self._checkpointer.save_checkpointables_async(
      step, {"training": training | {"step": state.step}, "ema": state.ema}
    )

  def restore(self, abstract: TrainState) -> TrainState | None:
    """Returns the newest state that can be read, None if there is no checkpoint.

    Arrays are placed as the shardings of `abstract` say. A checkpoint that is newer
    but damaged is named on stderr, and removed.
    """
    tree = {"params": abstract.params, "opt_state": abstract.opt_state}
    wanted = {"training": tree | {"step": abstract.step}, "ema": abstract.ema}
    loaded, damaged = self._newest(wanted)
    for step in damaged:  # Orbax would refuse to save older steps beside it
      self._checkpointer.delete(step)
    return loaded and TrainState(ema=loaded["ema"], **loaded["training"])

  def restore_ema(self, abstract: dict[str, Params]) -> dict[str, Params] | None:
    """Returns the averages alone, as `restore` does, but removes nothing.

    The work directory may be another run's, which reading must not change.
    """
    loaded, _ = self._newest({"ema": abstract})
    return loaded and loaded["ema"]

  def _newest(self, wanted: dict[str, Any]) -> tuple[dict[str, Any] | None, list[int]]:
    """Returns the newest checkpoint that can be read, and the damaged newer steps."""
    damaged: dict[int, Exception] = {}
    steps = sorted((c.step for c in self._checkpointer.checkpoints), reverse=True)
    for step in steps:
      try:
        loaded = self._checkpointer.load_checkpointables(step, wanted)
      except Exception as error:  # whatever a missing or short file leads to
        damaged[step] = error
        continue
      for bad, error in damaged.items():
        reason = str(error).splitlines()[0][:200]
        print(f"checkpoint {bad} is damaged, using {step}: {reason}", file=sys.stderr)
      return loaded, [*damaged]
    if damaged:
      raise damaged[steps[0]]
    return None, []
