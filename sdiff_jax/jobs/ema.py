"""Job `ema`: makes averages of another width from those that a run stored."""

import os
import shutil
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sdiff_jax import config as config_lib
from sdiff_jax import registry
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.jobs import convert
from sdiff_jax.training import checkpoints as checkpoints_lib
from sdiff_jax.training import ema
from sdiff_jax.types import Array, Params, UserError

DEFAULTS = {
  "ema": {
    # Width of the new average, "power/sigma_rel", from power profiles of the
    # checkpoints that checkpoint.keep_every kept; two profiles suffice.
    "posthoc_std": "",
  }
}


@registry.register("jobs", "ema", defaults=DEFAULTS, runtime=("ema.posthoc_std",))
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes WORKDIR/posthoc/WIDTH, a work directory of the average of that width.

  It is the average up to the newest checkpoint, or up to sample.checkpoint's step
  (into WIDTH_STEP); its own checkpoint is of step 0.

  Raises:
    UserError: config.ema.posthoc_std is no power profile, or the run stored none.
  """
  kind, sigma_rel = config_lib.name_and_number(
    config.ema.posthoc_std, "ema.posthoc_std"
  )
  chosen = workdir_lib.read(workdir)
  powers = [p for p in chosen.ema.profiles if p.startswith("power/")]
  if kind != "power" or not powers:
    raise UserError(
      f"config.ema.posthoc_std={config.ema.posthoc_std!r}: takes power/sigma_rel, of a run "
      f"with power profiles; those of {workdir} are {', '.join(chosen.ema.profiles)}"
    )
  step = config.sample.checkpoint or checkpoints_lib.newest(workdir)
  steps = [s for s in checkpoints_lib.steps(workdir) if step and 0 < s <= step]
  chosen.mesh = config.mesh
  experiment = experiments.build(chosen)
  if not steps:
    raise UserError(f"{workdir} has no checkpoint up to step {step}; train it first")
  widths = [config_lib.name_and_number(p, "ema.profiles")[1] for p in powers]
  try:
    w, left = ema.posthoc(
      np.repeat(steps, len(powers)), np.tile(widths, len(steps)), step, sigma_rel
    )
  except ValueError as error:
    raise UserError(
      f"config.ema.posthoc_std={config.ema.posthoc_std!r}: {error}"
    ) from error
  if jax.process_index() == 0:
    print(f"{len(w)} averages make it up to {left:.2%} of its profile", file=sys.stderr)
  name = f"{sigma_rel:g}" + (f"_{step}" if config.sample.checkpoint else "")
  folder = os.path.join(workdir, "posthoc", name)
  convert.check_empty(folder)
  w = np.float32(w).reshape(len(steps), len(powers))
  total = _combined(chosen, experiment, workdir, steps, powers, w)
  chosen.ema.profiles = (config.ema.posthoc_std,)
  convert.write(chosen, experiment, folder, total)
  cost = os.path.join(workdir, "training.json")
  if jax.process_index() == 0 and os.path.exists(cost):
    shutil.copy(cost, folder)
  return f"averaged {len(steps)} checkpoints up to step {step}: {folder}"


def _combined(
  config: ml_collections.ConfigDict,
  experiment: experiments.Experiment,
  workdir: str,
  steps: list[int],
  profiles: list[str],
  w: np.ndarray,
) -> Params:
  """Returns the sum of averages times w [steps, profiles], a step at a time."""
  total = None
  for step, weights in zip(steps, w, strict=True):
    found = workdir_lib.restore_ema(
      config, experiment.network, experiment.mesh, workdir, "--job=train", step
    )

    def mix(*parts: Array, weights: np.ndarray = weights) -> Array:
      return sum(k * x for k, x in zip(weights, parts, strict=True))

    part = jax.tree.map(mix, *(found[p] for p in profiles))
    total = part if total is None else jax.tree.map(jnp.add, total, part)
  return total
