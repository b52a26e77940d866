"""Work directories, statistics and feature networks: valid files, and their readers."""

import functools
import json
import os
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import _valid_files as valid
import numpy as np

from sdiff_jax import config as configs
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import training
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.io import resumable
from sdiff_jax.metrics.features import classifier
from sdiff_jax.metrics.statistics import reference_statistics
from sdiff_jax.reports import loading as loading_of_runs
from sdiff_jax.reports import results
from sdiff_jax.training import checkpoints, metric_writer


@functools.cache
def _run() -> valid.Files:
  config = json.dumps(configs.base().to_dict()).encode()
  metrics = [{"step": k, "loss": 1 / k, "gradient_norm": 1.0} for k in (1, 2, 3)]
  row = {"model": "teacher", "sampler": "heun/16", "kind": "model", "images": 5000}
  row |= {"evaluations": 31, "frechet": 1.2, "precision": 0.9, "recall": 0.5}
  row |= {"images_per_second": 4712.25, "compute": 1.0, "grid": "heun-16.png"}
  training = {
    "steps": 3,
    "images": 48,
    "seconds": 2.5,
    "parameters": 1000,
    "flops": 1e9,
  }
  return {
    "config.json": config,
    "metrics.jsonl": "".join(json.dumps(m) + "\n" for m in metrics).encode(),
    "training.json": json.dumps(training).encode(),
    "evaluate/results.json": json.dumps([row]).encode(),
    "rollout/results.json": json.dumps([]).encode(),
    "command.txt": b"python -m sdiff_jax.main --config=configs/digits_diffusion.py\n",
  }


def _read_run(folder: str) -> None:
  """Reads everything of a work directory that does not need a checkpoint."""
  config = workdir_lib.read(folder)
  configs.validate(config)
  workdir_lib.stored_normalizer(folder)


def _write_checkpoint(folder: str) -> None:
  """Writes a work directory with random weights, as the job `convert` does."""
  import jax

  config = configs.base()
  config.model.update(width=16, depth=1)
  experiment = experiments.build(config)
  params = experiment.network.init(jax.random.key(0))
  training.save_initial(config, experiment, folder, params)


def _trained(folder: str) -> None:
  workdir_lib.trained(workdir_lib.read(folder), folder)


def _report(folder: str) -> None:
  """Reads a run as a report does: what is damaged is named, the rest is shown."""
  run = loading_of_runs.load(folder)
  results.table(results.distinct(run.rows))


def _settings(folder: str) -> None:
  output = resumable.Output(folder, "samples")
  output.claim({"steps": 3, "name": "x"}, write=False)


def _statistics(name: str) -> Callable[[str], Any]:
  return lambda folder: reference_statistics.read(os.path.join(folder, name), "fid")


def _edm2_statistics() -> valid.Files:
  mean, cov = np.arange(4.0), np.eye(4)
  return {"x.pkl": pickle.dumps({"fid": {"mu": mean, "sigma": cov}})}


def _normalizer(folder: str) -> None:
  workdir_lib.stored_normalizer(folder)


def _normalizer_files() -> valid.Files:
  maps = {
    f"{name}.{part}": np.ones(n, np.float32)
    for name, n in (("observation", 4), ("action", 2))
    for part in ("centre", "scale")
  }
  numbers = {"steps": np.array(2), "shape": np.array([16, 2]), "std": np.array(1.0)}
  return {"normalizer.npz": valid.npz(**maps, **numbers)}


def _checkpoints(folder: str) -> None:
  checkpoints.newest(folder)
  metric_writer.read_metrics(folder)


READERS: dict[str, valid.Reader] = {
  "work directory": valid.Reader(_run, _read_run, 10, ("config.json",)),
  "checkpoint": valid.Reader(lambda: valid.stored(_write_checkpoint), _trained, 1),
  "report": valid.Reader(_run, _report, 10),
  "metrics": valid.Reader(_run, _checkpoints, 2, ("metrics.jsonl",)),
  "settings": valid.Reader(
    lambda: {
      "settings.json": json.dumps({"steps": 3, "name": "x"}).encode(),
      "0.npz": b"",
    },
    _settings,
    4,
  ),
  "normalizer": valid.Reader(_normalizer_files, _normalizer, 6),
  "statistics npz": valid.Reader(
    lambda: {"x.npz": valid.npz(mu=np.arange(4.0), sigma=np.eye(4))},
    _statistics("x.npz"),
    6,
  ),
  "statistics pkl": valid.Reader(_edm2_statistics, _statistics("x.pkl"), 6),
  "classifier": valid.Reader(
    lambda: {
      "x.npz": (pathlib.Path(classifier.__file__).with_name("digits.npz").read_bytes())
    },
    lambda folder: classifier.load(os.path.join(folder, "x.npz")),
    2,
  ),
}
