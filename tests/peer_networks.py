"""Networks of other implementations in a fixture: configs, weights and arrays."""

import json
from collections.abc import Mapping

import numpy as np


def part(arrays: Mapping[str, np.ndarray], name: str) -> tuple[dict, dict, dict]:
  """Returns config, weights and arrays of a network, images as NHWC.

  Args:
    arrays: of a fixture; "configs" is JSON, and NAME/w/... are the weights.
    name: of the network.
  """
  config = json.loads(str(arrays["configs"]))[name]
  start = f"{name}/"
  own = {k.removeprefix(start): v for k, v in arrays.items() if k.startswith(start)}
  weights = {k[2:]: v for k, v in own.items() if k.startswith("w/")}
  rest = {k: v for k, v in own.items() if not k.startswith("w/")}
  images = {k: np.moveaxis(v, 1, -1) for k, v in rest.items() if v.ndim == 4}
  return config, weights, rest | images


def error(found: np.ndarray, wanted: np.ndarray) -> float:
  """Returns the largest difference, divided by the largest value."""
  found = np.asarray(found, np.float64)
  assert found.shape == wanted.shape
  return np.abs(found - wanted).max() / np.abs(wanted).max()
