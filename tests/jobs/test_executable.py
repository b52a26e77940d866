"""A run that starts from a training step that a rehearsal compiled."""

import json

import jax
import numpy as np
import pytest

from sdiff_jax import config as config_lib
from sdiff_jax.capacity import cache, chips
from sdiff_jax.distributed import executables
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.jobs import rehearse, train
from sdiff_jax.types import UserError

pytestmark = pytest.mark.slow  # 10 s


@pytest.fixture(scope="module")
def config():
  c = config_lib.base()
  c.model.update(width=16, depth=1)
  c.train.update(steps=2, batch_size=16)
  return c


@pytest.fixture(scope="module")
def saved(config, tmp_path_factory):
  """The file of a rehearsal on this machine's eight devices instead of a pod's."""
  folder = tmp_path_factory.mktemp("rehearsal")
  planned = config.copy_and_resolve_references()
  planned.rehearse.update(shape=(8, 8, 1), classes=10, topology="v5e:2x4")
  planned.rehearse.save = str(folder / "step.bin")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(chips, "devices", lambda pod: np.array(jax.devices()))
    patch.setattr(cache, "FOLDER", str(folder / "cache"))
    patch.setattr(rehearse, "LEVEL", "")
    rehearse.run(planned, str(folder))
  return folder / "step.bin"


def test_a_run_is_that_of_a_compiled_step(config, saved, tmp_path, monkeypatch):
  """To the bit, though nothing is compiled for the step."""
  train.run(config, str(tmp_path / "compiled"))
  loaded = config.copy_and_resolve_references()
  loaded.train.executable = str(saved)

  def refused(lowered, *args, **options):
    raise AssertionError("compiled")

  monkeypatch.setattr(jax.stages.Lowered, "compile", refused)
  train.run(loaded, str(tmp_path / "loaded"))
  first, second = (
    workdir_lib.trained(config, str(tmp_path / name))[1]
    for name in ("compiled", "loaded")
  )
  jax.tree.map(np.testing.assert_array_equal, first, second)


def test_other_programs_and_damaged_files(config, saved, tmp_path, monkeypatch):
  file = tmp_path / "step.bin"

  def message(content: bytes, **fields) -> str:
    file.write_bytes(content)
    run = tmp_path / str(fields)
    changed = config.copy_and_resolve_references()
    changed.train.update(fields | {"executable": str(file)})
    with pytest.raises(UserError) as error:
      train.run(changed, str(run))
    return str(error.value)

  content = saved.read_bytes()
  head, payload = content.split(b"\n", 1)
  start = f"{file}"
  assert message(content, batch_size=8).startswith(f"{start}: another program")
  assert message(content[:-9]).startswith(f"{start}: damaged; make it again")
  assert message(b"\x80\x04 a pickle").startswith(f"{start} is not valid JSON")
  old = json.loads(head)
  old["versions"]["jaxlib"] = "0.1.0"
  other = json.dumps(old).encode() + b"\n" + payload
  assert message(other).startswith(f"{start}: made with jaxlib 0.1.0, here is ")
  found = executables.versions() | {"libtpu": "1.0"}
  monkeypatch.setattr(executables, "versions", lambda *libraries: found)
  assert message(content).startswith(f"{start}: made with libtpu None, here is 1.0")
