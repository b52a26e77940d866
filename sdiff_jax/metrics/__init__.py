"""Metrics of sets of images, each registered by one module.

A metric is built for a feature network (see `sdiff_jax.metrics.features`) and returns
its values from what `metrics.statistics.streaming` has collected of two sets:

  @registry.register(
    "metrics",
    "mean_distance",
    columns={"mean_distance": ("Mean distance", "{:.2f}", "between mean features")},
  )
  def build(*, network: FeatureNetwork) -> Metric:
    def compute(samples, real, sums):
      return {"mean_distance": float(np.linalg.norm(samples.mean - real.mean))}

    return Metric(compute, needs=("moments",))

The fact `columns` says how reports show each value: key of the value -> (header, format,
description).
"""

from sdiff_jax.metrics._metric import FEATURES, MOMENTS, FeatureSet, Metric

__all__ = ["FEATURES", "MOMENTS", "FeatureSet", "Metric"]
