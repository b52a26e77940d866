"""Few-step training and parallel sampling of diffusion models in JAX.

    import sdiff_jax as sd

    network = sd.models.mlp.build(shape=(2,), cond={}, width=64, depth=2)
    loss = sd.losses.diffusion.build(network=network, sigma_d=0.5)
    trainer = sd.Trainer(loss, network, optax.adam(1e-3))

    denoiser = sd.trigflow.denoiser(net, sigma_d=0.5)
    sampler = sd.samplers.build("paraddim", sigma_d=0.5, steps=50, window=16)
    out = sd.samplers.sample(sampler, denoiser, seeds=range(64), shape=(8, 8, 1))

The process:
  trigflow           states, velocities, denoisers; maps to EDM, VP and rectified flow
  noise_schedules    noise levels of solver steps: TrigFlow, EDM, VP, rectified flow
  time_grids         times to train at and to sample at
  parameterizations  denoisers from eps, v, x0 and flow predictions
  guidance           classifier-free guidance

Training:
  losses             diffusion, ddpm, scm, scm_discrete, consistency, vsd
  models             mlp, dit, edm2, ddpmpp, unet1d
  data               data sets and batches
  training           optimizers, averages, checkpoints, the loop
  Trainer            a loss, a network and an optimizer as a step of training

Sampling:
  samplers           build, sample: solvers, sequential and parallel

Shared:
  CondSpec, Denoiser, LossFn, Network, UserError (types), registry, config

Names are imported when they are first used, so `import sdiff_jax` is cheap.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Name -> module that it is, or that holds it.
_MODULES = {
  "config": "config",
  "data": "data",
  "guidance": "diffusion.guidance",
  "losses": "losses",
  "models": "models",
  "noise_schedules": "diffusion.noise_schedules",
  "parameterizations": "diffusion.parameterizations",
  "registry": "registry",
  "samplers": "samplers",
  "time_grids": "diffusion.time_grids",
  "training": "training",
  "trigflow": "diffusion.trigflow",
}
_OBJECTS = {
  "CondSpec": "types",
  "Denoiser": "types",
  "LossFn": "types",
  "Network": "types",
  "Trainer": "training.trainer",
  "UserError": "types",
}
__all__ = ["__version__", *_MODULES, *_OBJECTS]


def __getattr__(name: str) -> Any:
  """Imports a public name when it is first used."""
  if name in _OBJECTS:
    return getattr(importlib.import_module(f"{__name__}.{_OBJECTS[name]}"), name)
  if name not in _MODULES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return importlib.import_module(f"{__name__}.{_MODULES[name]}")


def __dir__() -> list[str]:
  return sorted(__all__)
