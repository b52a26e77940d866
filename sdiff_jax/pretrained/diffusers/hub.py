"""Folders of the Hugging Face Hub."""

import importlib.util
import os
import re

from sdiff_jax.io import bounded, downloads
from sdiff_jax.pretrained.diffusers import weights as weights_lib
from sdiff_jax.types import UserError

HUB = "hf://"


def local(path: str, *, weights: bool = True) -> str:
  """Returns a local folder, after downloading it from the Hub if need be.

  Args:
    path: of the folder, which may lie in a bucket, or hf://organization/name.
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
  path = downloads.local(path)
  if not os.path.isdir(path):
    raise UserError(f"{path}: no such folder")
  return path


def check_name(path: str) -> None:
  """Checks that a path is hf://organization/name, and that it can be uploaded to.

  Args:
    path: of the repository.

  Raises:
    ValueError: it is not of that form, or the package huggingface_hub is missing.

  Example:
    >>> check_name("hf://me")
    Traceback (most recent call last):
    ValueError: 'hf://me': must be hf://ORG/NAME
  """
  if not re.fullmatch(rf"{HUB}[\w.-]+/[\w.-]+", path):
    raise ValueError(f"{path!r}: must be {HUB}ORG/NAME")
  if importlib.util.find_spec("huggingface_hub") is None:
    raise ValueError(
      f"{path!r}: needs the package huggingface_hub: pip install 'sdiff_jax[export]'"
    )


def push(folder: str, path: str) -> str:
  """Uploads a folder to the Hugging Face Hub in one commit; returns its address.

  The repository is created if it does not exist. The token is that of the package
  huggingface_hub (`hf auth login`, or HF_TOKEN).

  Args:
    folder: local.
    path: hf://organization/name.

  Raises:
    UserError: the upload failed.
  """
  import huggingface_hub

  name = path.removeprefix(HUB)
  api = huggingface_hub.HfApi()
  try:
    url = api.create_repo(name, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=folder)
  except Exception as error:  # of the network, of the Hub, or no permission
    reason = bounded.short(error, 200)
    raise UserError(
      f"{path}: the upload failed: {reason}; the files are in {folder}"
    ) from error
  return str(url)
