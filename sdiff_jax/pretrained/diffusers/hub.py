"""Folders of the Hugging Face Hub."""

import os

from sdiff_jax.io import bounded
from sdiff_jax.pretrained.diffusers import weights as weights_lib
from sdiff_jax.types import UserError

HUB = "hf://"


def local(path: str, *, weights: bool = True) -> str:
  """Returns a local folder, after downloading it from the Hub if need be.

  Args:
    path: of the folder, or hf://organization/name.
    weights: whether to download weights: for each part the files that are read.

  Raises:
    UserError: there is no such folder, or the download failed.
  """
  if path.startswith(HUB):
    name = path.removeprefix(HUB)
    try:
      import huggingface_hub
    except ImportError:
      raise UserError(
        f"{path} needs the package huggingface_hub: pip install 'sdiff_jax[diffusers]'; "
        f"or name the folder of a copy of https://huggingface.co/{name}"
      ) from None
    try:
      files = huggingface_hub.list_repo_files(name)
      patterns = [f for f in files if f.endswith((".json", ".txt"))]
      patterns += weights_lib.to_fetch(files) if weights else []
      return huggingface_hub.snapshot_download(name, allow_patterns=patterns)
    except Exception as error:  # of the network, of the Hub, or a wrong name
      reason = bounded.short(error, 200)
      raise UserError(
        f"{path}: the download failed: {reason}; a folder with a copy of "
        f"https://huggingface.co/{name} does as well"
      ) from error
  if not os.path.isdir(path):
    raise UserError(f"{path}: no such folder")
  return path
