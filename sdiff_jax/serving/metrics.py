"""Counts and times of the service, in the format of Prometheus."""

from collections.abc import Callable

import prometheus_client as prometheus

from sdiff_jax.serving.batcher import Batch

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST


class Metrics:
  """The metrics of one service; each has its own registry."""

  def __init__(self, waiting: Callable[[], int], open_connections: Callable[[], int]):
    """Makes the metrics.

    Args:
      waiting: () -> number of rows in the queue.
      open_connections: () -> number of connections.
    """
    self.registry = prometheus.CollectorRegistry()
    of = {"registry": self.registry}
    self.requests = prometheus.Counter(
      "sdiff_requests", "Requests by path and status.", ["path", "status"], **of
    )
    self.latency = prometheus.Histogram(
      "sdiff_latency_seconds",
      "From the request to the answer, of those answered, by lane.",
      ["lane"],
      buckets=SECONDS,
      **of,
    )
    self.batch_rows = prometheus.Histogram(
      "sdiff_batch_rows", "Rows of a batch.", ["lane"], buckets=COUNTS, **of
    )
    self.batch_seconds = prometheus.Histogram(
      "sdiff_batch_seconds", "Duration of a batch.", ["lane"], buckets=SECONDS, **of
    )
    self.passes = prometheus.Histogram(
      "sdiff_passes",
      "Sequential calls of the network, of each row.",
      ["lane"],
      buckets=COUNTS,
      **of,
    )
    self.padding = prometheus.Counter(
      "sdiff_padding_rows", "Rows that filled up batches.", ["lane"], **of
    )
    queue = prometheus.Gauge("sdiff_queue_rows", "Rows that wait.", **of)
    queue.set_function(waiting)
    connections = prometheus.Gauge("sdiff_connections", "Open connections.", **of)
    connections.set_function(open_connections)

  def batch(self, batch: Batch) -> None:
    """Counts a batch.

    Args:
      batch: that was computed.
    """
    name = batch.lane.name
    self.batch_rows.labels(name).observe(batch.count)
    self.batch_seconds.labels(name).observe(batch.seconds)
    self.padding.labels(name).inc(batch.size - batch.count)

  def text(self) -> bytes:
    """Returns all metrics in the format of Prometheus."""
    return prometheus.generate_latest(self.registry)
