"""Work directories: what is in the way, and errors of the system."""

import errno
import os

import pytest

from sdiff_jax.experiment import workdir
from sdiff_jax.types import UserError


@pytest.mark.parametrize("name", workdir.OUTPUT_FILES)
def test_a_directory_in_place_of_a_file_is_named(name, tmp_path):
  workdir.check_outputs(str(tmp_path))
  (tmp_path / name).mkdir()
  with pytest.raises(UserError, match=f"{name} is a directory; move it out"):
    workdir.check_outputs(str(tmp_path))


@pytest.mark.parametrize("name", workdir.OUTPUT_FOLDERS)
def test_a_file_or_a_dangling_link_in_place_of_a_directory_is_named(name, tmp_path):
  (tmp_path / name).mkdir()
  workdir.check_outputs(str(tmp_path))
  (tmp_path / name).rmdir()
  for create in (tmp_path / name).touch, lambda: (tmp_path / name).symlink_to("none"):
    create()
    with pytest.raises(UserError, match=f"{name} is not a directory; move it out"):
      workdir.check_outputs(str(tmp_path))
    (tmp_path / name).unlink()


@pytest.mark.parametrize(
  ("code", "remedy"),
  [
    (errno.ENOSPC, "free space"),
    (errno.EMFILE, r"allow more open files \(ulimit -n\)"),
    (errno.EACCES, "change the permissions"),
    (errno.EISDIR, "move it out of the way"),
    (errno.ENAMETOOLONG, "use a shorter name"),
    (errno.EIO, "check the disk"),
  ],
)
def test_an_error_of_the_system_is_one_line_with_what_helps(code, remedy, tmp_path):
  (tmp_path / "checkpoints" / "7").mkdir(parents=True)
  text = os.strerror(code)
  line = f"^a/file: {text}; the last good checkpoint is that of step 7; {remedy}, then"
  with pytest.raises(UserError, match=line), workdir.errors(str(tmp_path)):
    raise OSError(code, text, "a/file")


def test_other_errors_of_the_system_keep_their_traceback(tmp_path):
  with pytest.raises(ProcessLookupError), workdir.errors(str(tmp_path)):
    raise OSError(errno.ESRCH, "No such process")
