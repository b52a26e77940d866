"""The cost of a finished run, training.json: what is written and read."""

import os
from typing import Annotated, TypedDict

import msgspec

from sdiff_jax.io import file_io, records, storage
from sdiff_jax.io.records import Count, Seconds

SUMMARY = "training.json"  # in a work directory

Flops = Annotated[float, msgspec.Meta(ge=0)]


class _Steps(TypedDict):
  steps: Count


class Summary(_Steps, total=False):
  """Content of training.json; runs of earlier versions may lack all but the steps.

  Attributes:
    steps: number of training steps.
    images: number of images of these steps.
    seconds: duration of training.
    parameters: number of parameters of the network.
    flops: floating-point operations of training.
    goodput: seconds by what they were spent on, and the number of starts (see
      training/goodput.py).
  """

  images: Count
  seconds: Seconds | None
  parameters: Count | None
  flops: Flops | None
  goodput: dict[str, Seconds]


def exists(workdir: str) -> bool:
  """Returns whether a work directory has a training.json.

  Args:
    workdir: of the run.

  Example:
    >>> exists("nothing/here")
    False
  """
  return storage.lexists(os.path.join(workdir, SUMMARY))


def write(workdir: str, summary: Summary, parameters: str) -> None:
  """Writes training.json, and parameters.txt before it.

  Args:
    workdir: of the run.
    summary: cost of the run.
    parameters: list of the arrays of the network, a text.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   write(folder, {"steps": 10}, "w [2, 2]")
    ...   read(folder)
    {'steps': 10}
  """
  file_io.write_text(os.path.join(workdir, "parameters.txt"), parameters + "\n")
  file_io.write_json(os.path.join(workdir, SUMMARY), summary)


def read(workdir: str | os.PathLike[str]) -> Summary | None:
  """Returns the cost of a run, None if it has not finished.

  Args:
    workdir: of the run.

  Raises:
    UserError: the file is damaged.

  Example:
    >>> read("nothing/here") is None
    True
  """
  path = os.path.join(workdir, SUMMARY)
  if not storage.lexists(path):
    return None
  remedy = "remove it, and the job train writes it again"
  return records.read(path, Summary, remedy)


def flops_ratio(workdir: str, reference: str, step: int = 0) -> float | None:
  """Returns the operations of training up to a step, as a fraction of another run's.

  Args:
    workdir: of the run.
    reference: work directory of the other run, of which all steps count.
    step: of the run; 0 for all of its steps.

  Returns:
    The fraction; None if the operations of one of the runs are not known.

  Raises:
    UserError: a training.json is damaged.

  Example:
    >>> flops_ratio("nothing/here", "nothing/here") is None
    True
  """
  cost, other = read(workdir), read(reference)
  if cost is None or other is None or not cost["steps"] or not other["steps"]:
    return None
  flops, of_other = cost.get("flops"), other.get("flops")
  if not flops or not of_other:
    return None
  return (step or cost["steps"]) / cost["steps"] * flops / of_other
