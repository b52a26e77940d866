"""Error of EDM2's output and tangent in half precision, against float64.

  python benchmarks/tangent_error.py

Random weights, 16 x 16 x 4 images, 32 and 64 channels. Prints, for each embedding of
time and each modulation, the root mean square of F and of J = cos t sin t dF/dt along
the flow and at a fixed x, and how far each narrower type is from float64, relative.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from sdiff_jax.data import class_cond
from sdiff_jax.diffusion.trigflow import expand
from sdiff_jax.models import edm2

SIGMA_D, BATCH, SHAPE, CLASSES = 0.5, 16, (16, 16, 4), 10
SIZE = {"channels": 32, "channel_mult": (1, 2), "blocks": 1, "attn_resolutions": (8,)}
TYPES = ("float64", "float32", "bfloat16", "float16")


def weights(network: object) -> dict:
  """Returns normal weights in float64, gains of 1 and EDM2's frequencies."""
  rng = np.random.default_rng(0)

  def of(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    scale = 2 * np.pi if path[-1].key in ("freqs", "phases") else 1
    return jnp.asarray(scale * rng.standard_normal(leaf.shape) if leaf.shape else 1.0)

  return jax.tree.map_with_path(of, jax.eval_shape(network.init, jax.random.key(0)))


def outputs(params: dict, dtype: str, **fields: str) -> list[np.ndarray]:
  """Returns F and the two tangents, computed in a type."""
  wide = "float64" if dtype == "float64" else "float32"
  network = edm2.build(
    shape=SHAPE,
    cond=class_cond(CLASSES),
    sigma_d=SIGMA_D,
    dtype=dtype,
    **SIZE,
    **fields,
  )
  rng = np.random.default_rng(1)
  x, v = (jnp.asarray(a, wide) for a in rng.standard_normal((2, BATCH, *SHAPE)))
  t = jnp.asarray(rng.uniform(0.05, 1.5, BATCH), wide)
  params = jax.tree.map(lambda p: p.astype(wide), params)
  cond = {"label": jnp.arange(BATCH, dtype=jnp.int32) % CLASSES}

  @jax.jit
  def both(params: dict, x: jax.Array, t: jax.Array) -> tuple:
    cs = jnp.cos(t) * jnp.sin(t)
    bound = lambda x, t: network.apply(params, x, t, cond)  # noqa: E731
    F, along = jax.jvp(bound, (x, t), (expand(cs, x) * v, cs))
    return F, along, jax.jvp(bound, (x, t), (0 * x, cs))[1]

  return [np.asarray(a, np.float64) for a in both(params, x, t)]


def rms(a: np.ndarray) -> float:
  return float(np.sqrt(np.mean(a**2)))


def main() -> None:
  jax.config.update("jax_enable_x64", True)
  print(f"{'':34s}{'F':>8s}{'J':>8s}{'J, x fixed':>12s}")
  for embedding, norm in itertools.product(
    ("positional", "fourier"), ("double", "single")
  ):
    fields = {"embedding": embedding, "norm": norm}
    params = weights(
      edm2.build(
        shape=SHAPE, cond=class_cond(CLASSES), sigma_d=SIGMA_D, **SIZE, **fields
      )
    )
    exact = outputs(params, "float64", **fields)
    print(f"{embedding:12s}{norm:8s}{'rms':14s}", *(f"{rms(a):8.3f}" for a in exact))
    for dtype in TYPES[1:]:
      found = outputs(params, dtype, **fields)
      errors = [rms(a - b) / rms(b) for a, b in zip(found, exact, strict=True)]
      print(f"{'':20s}{dtype:14s}", *(f"{e:8.1e}" for e in errors), flush=True)


if __name__ == "__main__":
  main()
