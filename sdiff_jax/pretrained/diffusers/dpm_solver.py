"""The orders of DPM-Solver++ in its last steps, as DPMSolverMultistepScheduler has them."""

from collections.abc import Callable

from sdiff_jax.pretrained.files.config_fields import Field
from sdiff_jax.samplers.solvers import dpmpp
from sdiff_jax.types import Json

# Number of all steps -> the largest orders of the last ones.
FinalOrders = Callable[[int], tuple[int, ...]]
FIELDS = {
  "lower_order_final": Field(True, bool),
  "euler_at_final": Field(False, bool | None),
}


def final_orders(c: dict[str, Json]) -> FinalOrders:
  """Returns the largest orders of the last steps that a config asks for.

  They depend on the number of all steps, also where only some of them are taken.

  Args:
    c: fields with their values; a class without these has the defaults of DPM-Solver++.

  Example:
    >>> orders = final_orders({"lower_order_final": True, "euler_at_final": True})
    >>> orders(14), orders(15)
    ((2, 1), (1,))
  """

  def orders(steps: int) -> tuple[int, ...]:
    few = dpmpp.short_orders(steps) if c.get("lower_order_final", True) else ()
    return few or (1,) * bool(c.get("euler_at_final"))

  return orders
