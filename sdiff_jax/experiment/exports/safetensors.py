"""Format `safetensors`: the averaged parameters in this package's layout."""

import os

from sdiff_jax import registry
from sdiff_jax.experiment.exports import Run, Written
from sdiff_jax.io import file_io
from sdiff_jax.pretrained.files import safetensors_file, to_tensors

FILE, CONFIG = "params.safetensors", "config.json"


@registry.register("experiment.exports", "safetensors")
def write(run: Run, folder: str) -> Written:
  """Writes params.safetensors, whose names are keys with slashes, and config.json.

  `--job=convert` reads the file with the run's config.

  Args:
    run: the run.
    folder: where.
  """
  safetensors_file.write(os.path.join(folder, FILE), to_tensors.flat(run.params))
  file_io.write_json(os.path.join(folder, CONFIG), run.stored.to_dict())
  usage = f"""`{FILE}` has the averaged parameters by their keys ("net/out/kernel"), in Flax's
layout, and `{CONFIG}` the config of the run. With its config file C.py:

```
python -m sdiff_jax.main --config=C.py --job=convert --config.convert.file={FILE} --workdir=DIR
```
"""
  return Written("safetensors", usage)
