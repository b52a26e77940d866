"""Parameters that were stored are finite where they are read."""

import jax
import numpy as np

from sdiff_jax.types import Params, UserError

MAX_NAMES = 3  # of tensors in a message


def check(params: Params, source: str, remedy: str) -> None:
  """Checks that parameters are finite, those on the devices of this process.

  Args:
    params: arrays on devices or on the host.
    source: where they come from; the start of the message.
    remedy: the end of the message.

  Raises:
    UserError: tensors are not finite; the message has their names.

  Example:
    >>> check({"net": {"kernel": np.array([np.nan])}}, "run", "train again")
    Traceback (most recent call last):
    ...
    sdiff_jax.types.UserError: run: weights that are not finite: net.kernel; train again
  """
  bad = [
    ".".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
    for path, x in jax.tree.leaves_with_path(params)
    if not _is_finite(x)
  ]
  if bad:
    more = f" and {len(bad) - MAX_NAMES} more" if len(bad) > MAX_NAMES else ""
    raise UserError(
      f"{source}: weights that are not finite: {', '.join(bad[:MAX_NAMES])}{more}; "
      f"{remedy}"
    )


def _is_finite(x: jax.Array | np.ndarray) -> bool:
  if not jax.numpy.issubdtype(x.dtype, jax.numpy.floating):
    return True
  parts = [x]
  if isinstance(x, jax.Array):  # each part once, though several devices may hold it
    parts = [*{str(s.index): s.data for s in x.addressable_shards}.values()]
  for part in map(np.asarray, parts):
    with np.errstate(all="ignore"):
      # A sum is faster than a test of each number, but it may overflow.
      if not np.isfinite(part.sum()) and not np.isfinite(part).all():
        return False
  return True
