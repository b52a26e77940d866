"""What a study measures of a trained run beside its samples."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sdiff_jax import data
from sdiff_jax.diffusion import time_grids, trigflow
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import sampling, teachers
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.experiment.errors import config_errors
from sdiff_jax.losses import _velocity, scm, tangent_norm
from sdiff_jax.samplers import comparison
from sdiff_jax.types import Array, Denoiser, Json, Params

TOLERANCES = (0.01, 0.03, 0.1, 0.3, 1.0)
WINDOWS = (4, 8, 16, 32)


def tangent_terms(config: ml_collections.ConfigDict, workdir: str) -> dict[str, float]:
  """Returns the size of each of `scm.parts` of an sCD run, and of the sum, "tangent".

  Root mean squares over a sample, their means over the first batch of training, by the
  average that is sampled from; angles and noise are the same for all runs.
  """
  experiment, params = workdir_lib.trained(config, workdir)
  stored = workdir_lib.read(workdir)
  stored.teacher = config.teacher
  loss, sigma_d = stored.loss, experiment.sigma_d
  teacher, frozen = teachers.load_teacher(stored, experiment)
  velocity_of = _velocity.ode_field(teacher.apply, sigma_d=sigma_d)
  size, over_batch = stored.train.batch_size, sharding.batch(experiment.mesh)
  with config_errors("config.train"):
    sharding.check_batch(size, over_batch)
  options = {"batch_size": size, "rows": sharding.rows(over_batch, size)}
  batches = data.batches(experiment.dataset, seed=0, sigma_d=sigma_d, **options)
  batch = sharding.make_global_batch(next(batches), over_batch, size)

  def sizes(params: Params, frozen: Params, batch: dict) -> dict[str, Array]:
    x0, cond = batch["x0"], batch["cond"]
    key_t, key_z = jax.random.split(jax.random.key(0))
    proposal = {"p_mean": loss.p_mean, "p_std": loss.p_std}
    t = time_grids.log_normal(key_t, size, **proposal, sigma_d=sigma_d)
    z = sigma_d * jax.random.normal(key_z, x0.shape, x0.dtype)
    xt = trigflow.perturb(x0, z, t)
    v = velocity_of(frozen, x0, z, xt, t, cond)
    net = functools.partial(experiment.network.apply, params)
    found = scm.tangent_terms(net, xt, t, v, cond, sigma_d=sigma_d)
    found["tangent"] = sum(found.values())
    return {name: jnp.mean(tangent_norm(g, rms=True)) for name, g in found.items()}

  call = jax.jit(
    sharding.with_mesh(experiment.mesh, sizes),
    out_shardings=sharding.replicated(experiment.mesh),
  )
  return {name: float(x) for name, x in call(params, frozen, batch).items()}


def parallel_sampling(
  config: ml_collections.ConfigDict, workdir: str
) -> list[dict[str, Json]]:
  """Returns the cost of config.sampler and its error to the sequential sampler.

  It is measured at each of TOLERANCES with sampler.window, then with each of WINDOWS at
  sampler.tolerance, on sample.num images. Speculative sampling has no tolerance and
  draws different samples from the same distribution, so it has no error.
  """
  experiment, params = workdir_lib.trained(config, workdir)
  mesh, sampler = experiment.mesh, sampling.build_sampler(config)
  count = config.sample.num
  with config_errors("config.sample"):
    sharding.check_batch(count, sharding.samples(mesh), name="num")
  seeds, cond = sampling.seeds_and_conditions(config, experiment, np.arange(count))

  def denoiser_of(params: Params) -> Denoiser:
    return sharding.with_mesh(
      mesh, sampling.denoiser(experiment, params, config.sample.guidance)
    )

  measure = comparison.sweep(
    denoiser_of,
    params,
    sampler,
    seeds,
    experiment.dataset.shape,
    {name: jnp.asarray(values) for name, values in cond.items()},
    mesh=mesh,
  )
  rows = []
  if sampler.takes("tolerance"):
    costs = measure(sampler, TOLERANCES)
    rows += [
      {"tolerance": tolerance} | _row(cost)
      for tolerance, cost in zip(TOLERANCES, costs, strict=True)
    ]
  for window in WINDOWS:
    if window <= sampler.num_steps:
      (cost,) = measure(sampler.replace(window=window))
      rows.append({"window": window} | _row(cost))
  if sampler.fact("exact"):
    rows = [row | {"error": None} for row in rows]
  return rows


def _row(cost: comparison.Cost) -> dict[str, float]:
  """Returns a cost under the names that studies store."""
  iterations, evaluations, error = cost
  return {"passes": iterations, "evaluations": evaluations, "error": error}
