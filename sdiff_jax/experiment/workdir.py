"""Work directories that cannot be written: what is refused, and in which words."""

import contextlib
import errno
import os
from collections.abc import Iterator

from sdiff_jax.training import checkpoints
from sdiff_jax.types import UserError

# What the system says where there is no space or no permission to write.
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS}
NO_ACCESS |= {errno.ENOTDIR, errno.EISDIR, errno.EEXIST}


def check_writable(workdir: str) -> None:
  """Refuses a work directory that cannot be made or written, and makes nothing.

  Raises:
    UserError: it names the directory that is in the way.
  """
  folder = workdir
  while not os.path.lexists(folder):
    folder = os.path.dirname(folder)
  if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
    raise UserError(
      f"--workdir={workdir}: {folder} is not a directory that this user may write; "
      "take another --workdir, or change its permissions"
    )


@contextlib.contextmanager
def errors(workdir: str) -> Iterator[None]:
  """Makes a UserError of a full disk or a missing permission.

  Raises:
    UserError: names what could not be written and what is safe.
  """
  try:
    yield
  except OSError as error:
    if error.errno not in NO_SPACE | NO_ACCESS:
      raise
    step = checkpoints.newest(workdir)
    safe = "" if step is None else f"; the last good checkpoint is that of step {step}"
    remedy = "make space" if error.errno in NO_SPACE else "change the permissions"
    raise UserError(
      f"{error.filename or workdir}: {error.strerror}{safe}; {remedy}, then the same "
      "command goes on"
    ) from error
