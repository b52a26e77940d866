"""Times that were measured on a device, to stand beside the modeled ones."""

from typing import NamedTuple


class Measurement(NamedTuple):
  """The measured time of one run of a program.

  Attributes:
    kind: "train" or "sample".
    chip: key of chips.CHIPS.
    num_parameters: of the network.
    images_per_chip: of a training step, or of a batch of samples.
    chips: number of chips.
    seconds: median time of one run.
    note: device, versions, circumstances.
  """

  kind: str
  chip: str
  num_parameters: int
  images_per_chip: float
  chips: int
  seconds: float
  note: str


MEASUREMENTS = (
  Measurement(
    *("train", "h100", 293_926_210, 32, 1, 72.6e-3),
    "one H100, jax 0.11.2, bfloat16, with other work on the same GPU; EDM2-S",
  ),
)


def find(
  kind: str, chip: str, num_parameters: int, images_per_chip: float
) -> Measurement | None:
  """Returns the measurement of a program, None if there is none.

  The number of chips may differ from that of the program.
  """
  wanted = (kind, chip, num_parameters, images_per_chip)
  return next((m for m in MEASUREMENTS if m[:4] == wanted), None)
