"""Job `ema`: computes a post-hoc EMA of another width from the stored averages."""

import dataclasses
import os
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sdiff_jax import config as config_lib
from sdiff_jax import registry
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import training
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.io import file_io
from sdiff_jax.training import checkpoints as checkpoints_lib
from sdiff_jax.training import ema, summary
from sdiff_jax.types import Array, Params, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Posthoc:
  """A post-hoc average.

  Attributes:
    posthoc_std: width of the new average, "power/sigma_rel", from power profiles of the
      checkpoints that checkpoint.keep_every kept; two profiles suffice.
  """

  posthoc_std: str = ""


@registry.register(
  "jobs", "ema", sections={"ema": Posthoc}, runtime=("ema.posthoc_std",)
)
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes WORKDIR/posthoc/WIDTH, a work directory with the average of that width.

  The average is that up to the newest checkpoint, or up to the step of
  config.sample.checkpoint (into WIDTH_STEP). Its own checkpoint has step 0.

  Raises:
    UserError: config.ema.posthoc_std is not a power profile, or the run stored none.
  """
  kind, sigma_rel = config_lib.name_and_number(
    config.ema.posthoc_std, "ema.posthoc_std"
  )
  stored = workdir_lib.read(workdir)
  parsed = {profile: ema.parse_profile(profile) for profile in stored.ema.profiles}
  widths = {p: number for p, (name, number) in parsed.items() if name == "power"}
  powers = [*widths]
  if kind != "power" or not powers:
    raise UserError(
      f"config.ema.posthoc_std={config.ema.posthoc_std!r}: must be power/sigma_rel, of a "
      f"run with power profiles; those of {workdir} are {', '.join(stored.ema.profiles)}"
    )
  step = config.sample.checkpoint or checkpoints_lib.newest(workdir)
  steps = [s for s in checkpoints_lib.steps(workdir) if step and 0 < s <= step]
  stored.mesh = config.mesh
  experiment, cost = experiments.build(stored), summary.read(workdir)
  if not steps:
    raise UserError(f"{workdir} has no checkpoint up to step {step}; train it first")
  try:
    w, distance = ema.posthoc(
      np.repeat(steps, len(powers)),
      np.tile([*widths.values()], len(steps)),
      step,
      sigma_rel,
    )
  except ValueError as error:
    raise UserError(
      f"config.ema.posthoc_std={config.ema.posthoc_std!r}: {error}"
    ) from error
  if jax.process_index() == 0:
    print(
      f"sum of {len(w)} averages; relative error of the profile: {distance:.2%}",
      file=sys.stderr,
    )
  name = f"{sigma_rel:g}" + (f"_{step}" if config.sample.checkpoint else "")
  folder = os.path.join(workdir, "posthoc", name)
  training.check_no_checkpoints(folder)
  w = np.float32(w).reshape(len(steps), len(powers))
  total = _combined(stored, experiment, workdir, steps, powers, w)
  stored.ema.profiles = (config.ema.posthoc_std,)
  training.save_initial(stored, experiment, folder, total)
  if jax.process_index() == 0 and cost:
    file_io.write_json(os.path.join(folder, summary.SUMMARY), cost)
  return f"averaged {len(steps)} checkpoints up to step {step}: {folder}"


def _combined(
  config: ml_collections.ConfigDict,
  experiment: experiments.Experiment,
  workdir: str,
  steps: list[int],
  profiles: list[str],
  w: np.ndarray,
) -> Params:
  """Returns the sum of the averages times w [steps, profiles], one step at a time."""
  total = None
  for step, weights in zip(steps, w, strict=True):
    averages = workdir_lib.restore_ema(
      config, experiment.network, experiment.mesh, workdir, "--job=train", step
    )

    def mix(*parts: Array, weights: np.ndarray = weights) -> Array:
      return sum(k * x for k, x in zip(weights, parts, strict=True))

    part = jax.tree.map(mix, *(averages[p] for p in profiles))
    total = part if total is None else jax.tree.map(jnp.add, total, part)
  return total
