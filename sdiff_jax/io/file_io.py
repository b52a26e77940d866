"""Files that are written whole or not at all, and read with a clear error."""

import os
import pathlib


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a text file atomically: after a kill or on a full disk the old one stays."""
  temporary = pathlib.Path(f"{path}.tmp")
  temporary.write_text(text, "utf-8")
  os.replace(temporary, path)
