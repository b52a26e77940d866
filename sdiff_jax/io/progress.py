"""The progress of long work: a bar on a terminal, now and then a line elsewhere."""

import math
import sys
import time

import tqdm

PLAIN_SECONDS = 30.0  # between two lines without a terminal
LONG_SECONDS = 60.0  # work of which the second line says at once how long it will take


class Progress:
  """Shows how far some work is, how fast, and how long it will take; a context manager.

  Without a terminal a line is printed on stderr for the first call, for the last, and
  every PLAIN_SECONDS in between. The second call, which can estimate the time because
  the first one has compiled, prints a line if the work is long.

  Example:
    >>> with Progress(20, unit="image", active=False) as progress:
    ...   progress.add(5)
    ...   progress.done
    5
  """

  def __init__(
    self,
    total: int,
    *,
    label: str = "",
    unit: str = "",
    initial: int = 0,
    active: bool = True,
  ):
    """Stores the options; nothing is shown before the context is entered.

    Args:
      total: size of the whole work.
      label: what is done; the start of each line.
      unit: what the total counts, in the singular; "" if the label says it.
      initial: part of the work that earlier runs have done.
      active: whether anything is shown; False on all but one of several processes.
    """
    self.done, self._total, self._label = initial, total, label
    self._unit = f" {unit}s" if unit else ""
    self._active = active
    self._bar: tqdm.tqdm | None = None
    self._began: tuple[int, float] | None = None
    self._num_calls, self._printed = 0, -math.inf

  def __enter__(self) -> "Progress":
    if self._active and sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        total=self._total,
        initial=self.done,
        dynamic_ncols=True,
        unit=self._unit,
        bar_format=self._label
        + "{percentage:4.0f}% |{bar}| {n_fmt}/{total_fmt}"
        + (f"{self._unit}, {{rate_fmt}}" if self._unit else "")
        + "{postfix}, {remaining} left",
      )
    return self

  def __exit__(self, *exception: object) -> None:
    if self._bar is not None:
      self._bar.close()

  def add(self, count: int = 1, note: str = "") -> None:
    """Counts work that was done, and shows it (see `show`)."""
    self.show(self.done + count, note)

  def show(self, done: int, note: str = "") -> None:
    """Shows how much of the work is done.

    Args:
      done: part of the total.
      note: numbers to show; "" for the throughput.
    """
    self.done = done
    if not self._active:
      return
    if self._bar is not None:
      self._bar.set_postfix_str(note, refresh=False)
      self._bar.update(done - self._bar.n)
      return
    now = time.monotonic()
    self._num_calls += 1
    self._began = self._began or (done, now)
    steps, seconds = done - self._began[0], now - self._began[1]
    left = seconds / steps * (self._total - done) if steps > 0 else None
    estimate = self._num_calls == 2 and left is not None and left > LONG_SECONDS
    late = now - self._printed >= PLAIN_SECONDS
    if not late and not estimate and done < self._total:
      return
    self._printed = now
    if not note and steps > 0 and seconds > 0:
      note = f"{steps / seconds:,.4g}{self._unit}/s"
    parts = [f"{self._label} {done}/{self._total}{self._unit}", note]
    if left is not None:
      about = "about " if estimate else ""
      parts.append(f"{about}{tqdm.tqdm.format_interval(left)} left")
    # This is print and not logging, so that it does not depend on the log level.
    print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)
