"""Format `stablehlo`: the sampler as a program for CPU, CUDA and TPU, without this package.

The program has the parameters as arguments, and they lie beside it, since a serialized
program holds at most 2 GB, and constants of a program are compiled with it.
"""

import importlib.util
import os
import pathlib

import jax
import jax.export
import jax.numpy as jnp

from sdiff_jax import registry
from sdiff_jax.experiment import pipelines, sampling
from sdiff_jax.experiment.exports import Run, Written, _load
from sdiff_jax.experiment.pipelines import CompiledSampler
from sdiff_jax.io import file_io
from sdiff_jax.pretrained.files import safetensors_file, to_tensors
from sdiff_jax.types import Array, CondSpec, Params, UserError

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM, PARAMS, LOADER = "program.bin", "params.safetensors", "load.py"


@registry.register("experiment.exports", "stablehlo")
def write(run: Run, folder: str) -> Written:
  """Writes program.bin, params.safetensors and load.py.

  The number of images is a variable of the program. On the same machine, one device and
  a batch of the same size, its images are those of the job `sample` to the bit, unless
  the network has a fused attention: custom kernels are no StableHLO, so the program has
  the plain attention.

  Args:
    run: the run.
    folder: where.

  Raises:
    UserError: flatbuffers is missing, the samples are no images, or the sampler is a
      parallel one.
  """
  if importlib.util.find_spec("flatbuffers") is None:
    raise UserError(
      "config.export.format='stablehlo': needs the package flatbuffers: pip install "
      "'sdiff_jax[export]'"
    )
  sampler = sampling.build_sampler(run.config)
  if sampler.is_parallel:
    raise UserError(
      f"config.sampler.name={sampler.name!r}: a parallel sampler; its images to the "
      f"last step are those of {sampler.sequential().name!r}, which can be exported"
    )
  pipeline = sampling.pipeline(run.config, run.experiment)
  compiled = pipelines.batch_sampler(pipeline, sampler)
  params = {"params": run.params, "constants": pipeline.constants}
  program = exported(compiled, params, run.experiment.dataset.cond)
  file_io.write_bytes(os.path.join(folder, PROGRAM), program.serialize())
  safetensors_file.write(os.path.join(folder, PARAMS), to_tensors.flat(params))
  loader = pathlib.Path(_load.__file__).read_text("utf-8")
  file_io.write_text(os.path.join(folder, LOADER), loader)
  return Written(f"StableHLO for {', '.join(PLATFORMS)}", _usage(run))


def exported(
  sampler: CompiledSampler, params: Params, cond: dict[str, CondSpec]
) -> jax.export.Exported:
  """Returns the program (flat params, seeds int32 [b], conditions) -> images uint8.

  Args:
    sampler: jitted, of a pipeline on one device.
    params: {"params": of the model, "constants": the others}, or their shapes.
    cond: conditions of a sample, by name.
  """

  def run(tensors: dict[str, Array], seeds: Array, inputs: dict[str, Array]) -> Array:
    tree = to_tensors.unflat(tensors, params)
    return sampler.fn(tree["constants"], tree["params"], seeds, inputs)[0]

  (size,) = jax.export.symbolic_shape("b")
  flat = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype)
    for name, x in to_tensors.flat(params).items()
  }
  inputs = {
    name: jax.ShapeDtypeStruct((size, *spec.shape), jnp.dtype(spec.dtype))
    for name, spec in cond.items()
  }
  seeds = jax.ShapeDtypeStruct((size,), jnp.int32)
  return jax.export.export(jax.jit(run), platforms=PLATFORMS)(flat, seeds, inputs)


def _usage(run: Run) -> str:
  """Returns how the program is called."""
  cond = run.experiment.dataset.cond
  given, lines = "", []
  for name, spec in cond.items():
    kind = f"{jnp.dtype(spec.dtype).name} {['B', *spec.shape]}".replace("'", "")
    lines.append(f"* `{name}`, {kind}")
    if spec.num_classes:
      lines[-1] += f": classes from 0 to {spec.num_classes - 1}"
    value = f"np.zeros({(4, *spec.shape)}, np.{jnp.dtype(spec.dtype).name})"
    given += f", {name}={value}"
  conditions = "\n".join(lines) or "none"
  return f"""```python
import numpy as np
from load import load  # load.py of this folder

images = load()(range(4){given})
```

`images` are uint8 [B, H, W, C]; image k is computed from seed k and its conditions alone.
`pip install jax flatbuffers` is all that is needed, on CPUs, NVIDIA GPUs or TPUs. JAX
loads programs of versions that are up to six months older.

Conditions:

{conditions}
"""
