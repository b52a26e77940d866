"""Conversion of Linen modules to `Network`, and of networks to other processes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax.diffusion import trigflow
from sdiff_jax.models.layers import common
from sdiff_jax.models.layers.conditioning import Conditions
from sdiff_jax.types import Array, Cond, Network, Params, PRNGKey


def as_network(
  module: nn.Module,
  *,
  shape: tuple[int, ...],
  conditions: Conditions,
  head: nn.Module = common.LogVar(),  # noqa: B008
) -> Network:
  """Returns the Network of a Linen module (x, t, cond, deterministic=...) -> F.

  Args:
    module: Linen module with parameters only.
    shape: shape of one sample.
    conditions: conditions of the module, in the order in which they are embedded.
    head: Linen module of the adaptive weight, t [B] -> w_phi(t) [B].
  """

  def init(key: PRNGKey) -> Params:
    key_net, key_head = jax.random.split(key)
    x, t = jnp.zeros((1, *shape), jnp.float32), jnp.ones((1,), jnp.float32)
    values = {name: spec.batch(1) for name, spec in conditions}
    cond = {name: jnp.zeros(v.shape, v.dtype) for name, v in values.items()}
    net = module.init(key_net, x, t, cond or None, deterministic=True)["params"]
    return {"net": net, "logvar": head.init(key_head, t)["params"]}

  def apply(
    params: Params, x: Array, t: Array, cond: Cond, *, key: PRNGKey | None = None
  ) -> Array:
    rngs = None if key is None else {"dropout": key}
    F = module.apply(
      {"params": params["net"]}, x, t, cond, deterministic=key is None, rngs=rngs
    )
    return common.to_accumulation_dtype(F)

  def logvar(params: Params, t: Array) -> Array:
    return head.apply({"params": params["logvar"]}, t)

  return Network(init, apply, logvar)


def trigflow_from_ddpm(network: Network, sigma_d: float, abar: np.ndarray) -> Network:
  """Returns the TrigFlow form of a network that predicts the noise of a discrete process.

  The timestep is that of equal noise-to-data ratio; ln(sigma / alpha) is interpolated
  linearly between timesteps. See `trigflow.from_vp`; the parameters are the same.

  Args:
    network: network of (x, timestep, cond).
    sigma_d: standard deviation of the data.
    abar: alpha^2 at each timestep, float64 [T].
  """
  noise = np.log((1 - abar) / abar) / 2

  def apply(
    params: Params, x: Array, t: Array, cond: Cond, *, key: PRNGKey | None = None
  ) -> Array:
    levels, steps = (jnp.asarray(a, t.dtype) for a in (noise, np.arange(len(abar))))
    time = jnp.interp(jnp.log(sigma_d * jnp.tan(t)), levels, steps)

    def raw(x: Array, _: Array, cond: Cond) -> Array:
      return network.apply(params, x, time, cond, key=key)

    return trigflow.from_vp(raw, "eps", lambda alpha: alpha, sigma_d)(x, t, cond)

  return network._replace(apply=apply)


def trigflow_from_edm(network: Network, sigma_d: float) -> Network:
  """Returns the TrigFlow form of EDM's inner network, whose time is ln(sigma) / 4.

  See `trigflow.from_edm`; the parameters are the same.

  Args:
    network: network of (x, ln(sigma) / 4, cond).
    sigma_d: standard deviation of the data.
  """

  def apply(
    params: Params, x: Array, t: Array, cond: Cond, *, key: PRNGKey | None = None
  ) -> Array:
    raw = functools.partial(network.apply, params, key=key)
    return trigflow.from_edm(raw, sigma_d)(x, t, cond)

  def logvar(params: Params, t: Array) -> Array:
    return network.logvar(params, jnp.log(sigma_d * jnp.tan(t)) / 4)

  return network._replace(apply=apply, logvar=logvar)
