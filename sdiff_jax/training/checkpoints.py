"""Checkpoints of the training state; the only module that uses Orbax."""

import contextlib
import errno
import functools
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import jax

from sdiff_jax.io import storage
from sdiff_jax.training import checksums, stored_shapes
from sdiff_jax.training.state import TrainState
from sdiff_jax.types import Params, PyTree, UserError

FOLDER = "checkpoints"  # in a work directory
COMPLETE = "commit_success.txt"  # Orbax's last object of a checkpoint in a bucket
OTHER_NETWORK = (
  "it is a checkpoint of another network: use the fields that it was trained with"
)
REMEDY = "restore it from a copy, or remove it to use an older one or to train again"
INCOMPLETE = f"files of the checkpoint are missing or damaged; {REMEDY}"
# Errors of the system after which a checkpoint may be whole.
TEMPORARY = {errno.EACCES, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
TEMPORARY |= {errno.EPERM, errno.ESTALE, errno.ETIMEDOUT}


def steps(workdir: str) -> list[int]:
  """Returns the steps of the complete checkpoints on disk, in ascending order.

  Args:
    workdir: of the run.

  Example:
    >>> steps("nothing/here")
    []
  """
  folder = os.path.join(workdir, FOLDER)
  return sorted(int(name) for name in _saves(folder) if _is_complete(folder, name))


def newest(workdir: str) -> int | None:
  """Returns the step of the newest complete checkpoint on disk, or None.

  Args:
    workdir: of the run.

  Example:
    >>> newest("nothing/here") is None
    True
  """
  return max(steps(workdir), default=None)


def _saves(folder: str) -> list[str]:
  """Returns the names of the checkpoints in a folder, complete or not, by their steps."""
  try:
    names = storage.listdir(folder)
  except OSError:
    return []
  return [name for name in names if name.isascii() and name.isdecimal()]


def _is_complete(folder: str, name: str) -> bool:
  """Returns whether a checkpoint is complete.

  Orbax renames a checkpoint to its step when it is. In a bucket nothing is renamed: there
  Orbax writes an object at last.
  """
  return not storage.remote(folder) or storage.exists(f"{folder}/{name}/{COMPLETE}")


def _remove_incomplete(folder: str) -> None:
  """Removes what saves that were killed have left."""
  if storage.remote(folder):
    names = [name for name in _saves(folder) if not _is_complete(folder, name)]
  else:
    names = [n for n in os.listdir(folder) if "orbax-checkpoint-tmp" in n]
  for name in names:
    storage.rmtree(os.path.join(folder, name))


class Checkpoints:
  """The checkpoints of a work directory, as a context manager.

  Saving is asynchronous: the error of a save is raised at the next one, or at the end.
  In a run of several processes every process calls every method.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
    ...   print(checkpoints.latest)
    None
  """

  def __init__(self, workdir: str, *, keep: int = 1, keep_every: int = 0):
    """Opens WORKDIR/checkpoints.

    Args:
      workdir: directory of the run.
      keep: number of the newest checkpoints that are kept.
      keep_every: checkpoints of its multiples are kept permanently; 0 for none.
    """
    self._workdir, self._keep, self._keep_every = workdir, keep, keep_every
    self._pending: tuple[int, Any] | None = None  # step, Orbax's response
    if storage.remote(workdir):
      storage.filesystem()  # before Orbax makes its own, whose listings would be cached
    ocp = _orbax()
    policies = ocp.training.preservation_policies
    kept = [policies.LatestN(keep)]
    if keep_every:
      kept.append(policies.EveryNSteps(keep_every))
    self._checkpointer = ocp.training.Checkpointer(
      storage.absolute(os.path.join(workdir, FOLDER)),
      preservation_policy=policies.AnyPreservationPolicy(kept),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exception: object) -> None:
    self.wait()
    with self._os_errors():
      self._checkpointer.close()

  @property
  def latest(self) -> int | None:
    """The step of the newest checkpoint, or None."""
    newest = self._checkpointer.latest
    return None if newest is None else newest.step

  def check_disk(self, state: TrainState, saves: Iterable[int]) -> None:
    """Checks that the checkpoints of a run can be written and fit on the disk.

    Args:
      state: the state or its shapes.
      saves: steps of all checkpoints of the run, in ascending order.

    Raises:
      PermissionError: the folder of the checkpoints cannot be written.
      UserError: there is not enough space.
    """
    folder, saves = str(self._checkpointer.directory), list(saves)
    if storage.remote(folder):  # which has space
      return
    if not os.access(folder, os.W_OK | os.X_OK):
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
    permanent = {s for s in saves if self._keep_every and s % self._keep_every == 0}
    # The last one is written before the oldest one is deleted.
    simultaneous = permanent.union(saves[-self._keep - 1 :])
    more = len(simultaneous) - len(self._checkpointer.checkpoints)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / 1e6
    free = shutil.disk_usage(folder).free / 1e6
    if more * size > free:
      raise UserError(
        f"{self._workdir}: {more} more checkpoints of {size:.1f} MB need "
        f"{more * size:.1f} MB, and {free:.1f} MB are free; free space, use another "
        "directory, or keep fewer checkpoints"
      )

  def wait(self) -> None:
    """Waits for the save in progress, and raises its error if it failed."""
    if self._pending is not None:
      (step, response), self._pending = self._pending, None
      with self._os_errors():
        response.result()
      if jax.process_index() == 0:
        checksums.write(self._path(step))

  @contextlib.contextmanager
  def _os_errors(self) -> Iterator[None]:
    """Turns a ValueError of TensorStore about a system call into an OSError."""
    try:
      yield
    except ValueError as error:
      code = re.search(r"os_error_code='(\d+)'", str(error))
      if code is None:
        raise
      folder = str(self._checkpointer.directory)
      raise OSError(int(code[1]), os.strerror(int(code[1])), folder) from error

  def save(self, step: int, state: TrainState) -> None:
    """Starts saving. The averages are separate, so that they can be read alone."""
    self.wait()
    training = {"params": state.params, "opt_state": state.opt_state}
    trees = {"training": training | {"step": state.step}, "ema": state.ema}
    response = self._checkpointer.save_checkpointables_async(step, trees)
    self._pending = step, response

  def restore(self, abstract: TrainState) -> TrainState | None:
    """Returns the newest state that can be read, None if there is no checkpoint.

    Newer checkpoints that are damaged are reported on stderr and removed. So are the
    temporary files of a save that was killed.

    Args:
      abstract: shapes, types and shardings of the state.

    Raises:
      UserError: there are checkpoints, and none fits and can be read; the message names
        the newest, and what differs.
      OSError: the newest may be whole, but it cannot be read at present.
    """
    tree = {"params": abstract.params, "opt_state": abstract.opt_state}
    target = {"training": tree | {"step": abstract.step}, "ema": abstract.ema}
    loaded, damaged = self._newest(target)
    for step in damaged:  # Orbax refuses to save a step before the newest one
      self._checkpointer.delete(step)
    if jax.process_index() == 0:
      _remove_incomplete(str(self._checkpointer.directory))
    if loaded is None:
      return None
    return TrainState(ema=loaded["ema"], **loaded["training"])

  def restore_ema(
    self, abstract: dict[str, Params], step: int = 0
  ) -> dict[str, Params] | None:
    """Returns averages alone, as `restore` does, but removes no file.

    The work directory may belong to another run, which must not be changed.

    Args:
      abstract: profile -> shapes of the averages to read; others are not read.
      step: step of the checkpoint; 0 for the newest.

    Returns:
      The averages, or None if there is no such checkpoint.

    Raises:
      UserError: as in `restore`.
      OSError: as in `restore`.
    """
    loaded, _ = self._newest({"ema": abstract}, step)
    return None if loaded is None else loaded["ema"]

  def _path(self, step: int) -> str:
    return os.path.join(self._checkpointer.directory, str(step))

  def _damaged_file(self, step: int, target: dict[str, PyTree]) -> str:
    """Returns a file of the checkpoint that is not as it was written, or ""."""
    if jax.process_count() > 1:
      return ""  # each process would read all files
    return checksums.damaged(self._path(step), (*target,))

  def _newest(
    self, target: dict[str, PyTree], only: int = 0
  ) -> tuple[dict[str, PyTree] | None, list[int]]:
    """Returns the newest checkpoint that can be read, and the damaged newer steps."""
    reasons: dict[int, str] = {}
    steps = sorted((c.step for c in self._checkpointer.checkpoints), reverse=True)
    for step in (step for step in steps if only in (0, step)):
      reason, loaded = self._load(step, target)
      if loaded is None:
        reasons[step] = reason
        continue
      for bad_step, bad_reason in reasons.items():
        print(
          f"checkpoint {bad_step} is damaged, using {step}: {bad_reason}",
          file=sys.stderr,
        )
      return loaded, [*reasons]
    for step, reason in reasons.items():  # the newest one
      raise UserError(f"{self._path(step)}: {reason}")
    return None, []

  def _load(
    self, step: int, target: dict[str, PyTree]
  ) -> tuple[str, dict[str, PyTree] | None]:
    """Returns the trees of a checkpoint; or why it cannot be read, and None.

    Raises:
      OSError: the checkpoint may be whole, but it cannot be read at present.
    """
    try:
      # None for a tree whose description cannot be read; then loading raises the reason.
      stored = self._checkpointer.checkpointables_metadata(step).metadata
      for name, tree in target.items():
        if stored.get(name) is None:
          continue
        there = stored[name]
        if name == "ema":  # of which some profiles may be asked for
          there = {profile: x for profile, x in there.items() if profile in tree}
        if reason := stored_shapes.difference(there, tree, ("opt_state",)):
          return f"{name}.{reason}; {OTHER_NETWORK}", None
      if file := self._damaged_file(step, target):
        return f"the file {file} is missing or damaged; {REMEDY}", None
      with _partial_load():
        return "", self._checkpointer.load_checkpointables(step, target)
    except Exception as error:  # missing or short files raise errors of any type
      if code := _os_error(error):
        raise OSError(code, os.strerror(code), self._path(step)) from error
      return INCOMPLETE, None


def _os_error(error: BaseException | None) -> int:
  """Returns the number of the temporary error of the system behind an error, or 0."""
  while error is not None:
    text = re.search(r"os_error_code='(\d+)'", str(error))
    code = int(text[1]) if text else getattr(error, "errno", None)
    if code in TEMPORARY:
      return code
    error = error.__cause__ or error.__context__
  return 0


def _partial_load() -> contextlib.AbstractContextManager[object]:
  """Returns a context in which trees are read only as far as they are requested."""
  context = _orbax().Context()
  context.pytree.loading.partial_load = True
  return context


@functools.cache
def _orbax() -> ModuleType:
  """Returns Orbax, which is imported late since that is slow."""
  from orbax.checkpoint import v1

  # After an array that cannot be read, Orbax closes its event loop while threads of
  # TensorStore still report to it; Python would print a traceback for each of them.
  report = sys.unraisablehook

  def hook(unraisable: "sys.UnraisableHookArgs") -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
      report(unraisable)

  sys.unraisablehook = hook
  return v1
