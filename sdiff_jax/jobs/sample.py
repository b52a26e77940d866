"""Job `sample`: makes images from a trained work directory."""

import os

import jax
import ml_collections
import numpy as np
import tqdm

from sdiff_jax import writer
from sdiff_jax.jobs import experiment as experiments


def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes samples.npz (arr_0 uint8 NHWC, arr_1 labels) and samples.png."""
  experiment, params = experiments.trained(config, workdir)
  solver = experiments.table(config)
  call = experiments.sampler(experiment, solver)
  num = config.sample.num
  made = experiments.generate(
    experiment, call, params, num=num, batch_size=config.sample.batch_size
  )
  images, labels = [], []
  with tqdm.tqdm(total=num, unit="image", desc="sample", disable=None) as bar:
    for batch, classes in made:
      images.append(batch)
      labels.append(classes)
      bar.update(len(batch))
  images, labels = np.concatenate(images), np.concatenate(labels)
  path = os.path.join(workdir, "samples.npz")
  if jax.process_index() == 0:
    np.savez(path, images, labels)
    count, columns = experiments.grid_size(experiment)
    writer.save_png(path.replace(".npz", ".png"), writer.grid(images[:count], columns))
  return f"made {num} images ({solver.evaluations} evaluations each): {path}"
