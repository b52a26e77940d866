"""Copies on this machine of what lies in buckets, each of which is made once."""

import hashlib
import os
import shutil
import tempfile

from sdiff_jax.io import bounded, storage
from sdiff_jax.types import UserError

FOLDER = os.path.expanduser("~/.cache/sdiff_jax/buckets")


def local(path: str) -> str:
  """Returns a path of this machine with the content of a file or folder.

  An object, or all below a folder, is copied once to ~/.cache/sdiff_jax/buckets, under a
  name that its generations determine.

  Args:
    path: of a file or folder; one of this machine is returned as it is.

  Raises:
    UserError: there is nothing of that name in the bucket, or no space for the copy.
  """
  if not storage.remote(path):
    return path
  path = storage.absolute(path)
  objects = storage.objects(path)
  if not objects:
    raise UserError(f"{path} does not exist")
  if outside := [name for name in objects if ".." in name.split("/")]:
    raise UserError(f"{path}: the name {bounded.short(outside[0], 60)} leads out of it")
  names = path.removeprefix(storage.BUCKET)
  versions = sorted(
    (f"{names}/{name}" if name else names, info.get("generation"))
    for name, info in objects.items()
  )
  digest = hashlib.sha256(repr(versions).encode()).hexdigest()[:16]
  folder = os.path.join(FOLDER, digest)
  base = os.path.basename(path)
  if not os.path.isdir(folder):
    os.makedirs(FOLDER, exist_ok=True)
    needed = sum(info["size"] for info in objects.values()) / 1e6
    free = shutil.disk_usage(FOLDER).free / 1e6
    if needed > free:
      raise UserError(
        f"{path}: a copy needs {needed:.1f} MB, and {FOLDER} has {free:.1f} MB; free "
        "space, or make it a link to a larger disk"
      )
    temporary = tempfile.mkdtemp(dir=FOLDER, prefix=f"{digest}.tmp")
    for name in objects:
      target = os.path.normpath(os.path.join(temporary, base, name))
      os.makedirs(os.path.dirname(target), exist_ok=True)
      storage.download(os.path.join(path, name) if name else path, target)
    try:
      os.rename(temporary, folder)
    except OSError:  # another process was faster
      shutil.rmtree(temporary)
  return os.path.join(folder, base)
