"""Everything that the package reads from disks: valid inputs, and the calls.

A reader has files, by their paths below a folder, and a call with that folder. Each kind
of them has a file.
"""

import _data_readers
import _runs_readers
import _weights_readers
from _valid_files import Canary, Reader

__all__ = ["READERS", "Canary", "Reader"]

READERS: dict[str, Reader] = (
  _data_readers.READERS | _weights_readers.READERS | _runs_readers.READERS
)
