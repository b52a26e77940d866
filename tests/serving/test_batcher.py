"""The queue before the device: batches, bounds, deadlines, the end; and the ladder."""

import asyncio
import itertools
import threading
import time

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from sdiff_jax.serving import lanes as lanes_lib
from sdiff_jax.serving.batcher import Batcher, QueueFull, Stopping, TooLate
from sdiff_jax.serving.lanes import Lane


def square(rows):
  return {"y": rows["x"].astype(np.int64) ** 2}


def lane(function=square, sizes=(1, 4, 16), seconds=0.0) -> Lane:
  """A lane that computes at once, and claims to need so many seconds."""
  return Lane(
    "test", dict.fromkeys(sizes, function), dict.fromkeys(sizes, seconds or 1e-6)
  )


def rows(*values):
  return {"x": np.array(values, np.int32)}


class Gate:
  """A function of rows that waits until it is opened."""

  def __init__(self):
    self.open, self.entered = threading.Event(), threading.Event()
    self.calls = []

  def __call__(self, rows):
    self.calls.append(len(rows["x"]))
    self.entered.set()
    assert self.open.wait(20)
    return square(rows)


def served(scenario, **options):
  """Runs a coroutine of a started batcher; returns its result and the batches."""
  batches = []

  async def main():
    batcher = Batcher(
      **{"max_wait": 0.005, "max_queue": 1000, "on_batch": batches.append} | options
    )
    batcher.start()
    try:
      return await scenario(batcher)
    finally:
      await batcher.drain()

  return asyncio.run(main()), batches


@hypothesis.given(
  st.lists(st.integers(1, 40), min_size=1, max_size=12),
  st.sampled_from([(1,), (3,), (1, 4, 16), (2, 64)]),
)
@hypothesis.settings(max_examples=25)
def test_every_request_gets_its_own_rows(counts, sizes):
  """Whatever the sizes of requests and of the ladder: y = x^2, each row once."""
  of = lane(sizes=sizes)
  starts = np.cumsum([0, *counts])

  async def scenario(batcher):
    asked = [rows(*range(a, b)) for a, b in itertools.pairwise(starts)]
    return await asyncio.gather(*(batcher.submit(of, r) for r in asked))

  answers, batches = served(scenario)
  for first, count, answer in zip(starts, counts, answers, strict=False):
    assert answer.rows["y"].tolist() == [k**2 for k in range(first, first + count)]
  assert sum(batch.count for batch in batches) == sum(counts)
  assert all(batch.count <= batch.size <= max(sizes) for batch in batches)


def test_clients_share_a_batch():
  async def scenario(batcher):
    return await asyncio.gather(*(batcher.submit(of, rows(k)) for k in range(16)))

  of = lane()
  answers, batches = served(scenario)
  assert [batch.count for batch in batches] == [16]
  assert {answer.batch for answer in answers} == {16}


def test_a_lone_request_waits_no_longer_than_it_may():
  async def scenario(batcher):
    begin = time.perf_counter()
    answer = await batcher.submit(lane(), rows(3))
    return answer, time.perf_counter() - begin

  (answer, seconds), batches = served(scenario, max_wait=0.05)
  assert answer.rows["y"].tolist() == [9]
  assert 0.05 <= answer.waited <= seconds
  assert batches[0].size == 1


def test_a_full_batch_does_not_wait():
  async def scenario(batcher):
    return await batcher.submit(lane(sizes=(4,)), rows(1, 2, 3, 4))

  answer, _ = served(scenario, max_wait=60.0)
  assert answer.waited < 30


def test_what_does_not_fit_into_the_queue_is_refused_at_once():
  gate = Gate()
  of = lane(gate, sizes=(1,), seconds=10.0)

  async def scenario(batcher):
    first = asyncio.ensure_future(batcher.submit(of, rows(0)))
    await asyncio.to_thread(gate.entered.wait, 20)
    waiting = [asyncio.ensure_future(batcher.submit(of, rows(k))) for k in (1, 2, 3)]
    await asyncio.sleep(0)
    assert batcher.waiting == 3
    with pytest.raises(QueueFull) as caught:
      await batcher.submit(of, rows(9))
    gate.open.set()
    answers = await asyncio.gather(first, *waiting)
    assert batcher.waiting == 0
    return caught.value.retry_after, [a.rows["y"][0] for a in answers]

  (retry_after, squares), _ = served(scenario, max_queue=3)
  assert squares == [0, 1, 4, 9]
  assert (
    40 <= retry_after <= 51
  )  # at most ten seconds of the first, and four more calls


def test_the_oldest_lane_comes_first():
  gate, order = Gate(), []
  first, second = (
    lane(lambda rows, name=name: order.append(name) or square(rows)) for name in "ab"
  )

  async def scenario(batcher):
    blocking = asyncio.ensure_future(batcher.submit(lane(gate), rows(0)))
    await asyncio.to_thread(gate.entered.wait, 20)
    tasks = []
    for of in (second, first, second):
      tasks.append(asyncio.ensure_future(batcher.submit(of, rows(1))))
      await asyncio.sleep(0.001)
    gate.open.set()
    await asyncio.gather(blocking, *tasks)

  served(scenario)
  assert order == ["b", "a"]  # and both requests of b in one batch


def test_an_answer_that_would_be_late_is_refused():
  slow, calls = lane(seconds=5.0), []
  late = lane(lambda rows: calls.append(1) or time.sleep(0.2) or square(rows))

  async def scenario(batcher):
    now = time.perf_counter()
    with pytest.raises(TooLate):  # it is known before
      await batcher.submit(slow, rows(1), now + 1.0)
    with pytest.raises(TooLate):  # it turns out to be
      await batcher.submit(late, rows(1), now + 0.1)
    assert calls == [1]
    answer = await batcher.submit(late, rows(2), time.perf_counter() + 60)
    return answer.rows["y"].tolist()

  assert served(scenario)[0] == [4]


def test_a_deadline_that_passes_in_the_queue_costs_no_call():
  gate = Gate()
  of = lane(gate, sizes=(1,))

  async def scenario(batcher):
    first = asyncio.ensure_future(batcher.submit(of, rows(1)))
    await asyncio.to_thread(gate.entered.wait, 20)
    soon = asyncio.ensure_future(
      batcher.submit(of, rows(2), time.perf_counter() + 0.05)
    )
    await asyncio.sleep(0.1)
    gate.open.set()
    await first
    with pytest.raises(TooLate):
      await soon

  served(scenario)
  assert gate.calls == [1]


def test_a_client_that_has_gone_costs_no_call():
  gate = Gate()
  of = lane(gate, sizes=(1,))

  async def scenario(batcher):
    first = asyncio.ensure_future(batcher.submit(of, rows(1)))
    await asyncio.to_thread(gate.entered.wait, 20)
    gone = asyncio.ensure_future(batcher.submit(of, rows(2)))
    stays = asyncio.ensure_future(batcher.submit(of, rows(3)))
    await asyncio.sleep(0)
    gone.cancel()
    gate.open.set()
    answers = await asyncio.gather(first, stays)
    assert batcher.waiting == 0
    return [a.rows["y"][0] for a in answers]

  assert served(scenario)[0] == [1, 9]
  assert len(gate.calls) == 2


def test_a_failure_of_the_device_is_that_of_its_requests_alone():
  def fail(rows):
    raise RuntimeError("out of memory")

  async def scenario(batcher):
    with pytest.raises(RuntimeError, match="out of memory"):
      await batcher.submit(lane(fail), rows(*range(40)))
    return (await batcher.submit(lane(), rows(5))).rows["y"].tolist()

  assert served(scenario)[0] == [25]


def test_the_end_answers_what_was_taken():
  gate = Gate()
  of = lane(gate, sizes=(1,))

  async def scenario(batcher):
    tasks = [asyncio.ensure_future(batcher.submit(of, rows(k))) for k in range(5)]
    await asyncio.to_thread(gate.entered.wait, 20)
    batcher.stop()
    with pytest.raises(Stopping):
      await batcher.submit(of, rows(9))
    with pytest.raises(Stopping):
      await batcher.alone(lambda: None)
    gate.open.set()
    await batcher.drain()
    assert all(task.done() for task in tasks)
    return [task.result().rows["y"][0] for task in tasks]

  assert served(scenario)[0] == [0, 1, 4, 9, 16]


@hypothesis.given(st.integers(1, 200), st.floats(0.1, 10), st.floats(0, 10))
def test_the_best_size_finishes_the_most_rows_a_second(waiting, fixed, each):
  seconds = {size: fixed + each * size for size in (1, 4, 16, 64)}
  best = lanes_lib.best_size(seconds, waiting)
  rates = {size: min(waiting, size) / seconds[size] for size in seconds}
  assert rates[best] == max(rates.values())
  assert best == min(size for size, rate in rates.items() if rate == rates[best])
