"""Format `edm2`: the averaged parameters as the state dict of EDM2's U-Net."""

import os

from sdiff_jax import registry
from sdiff_jax.experiment.exports import Run, Written
from sdiff_jax.pretrained import edm2
from sdiff_jax.pretrained.files import safetensors_file
from sdiff_jax.types import UserError

FILE = "edm2.safetensors"
# Fields of the network that EDM2 published; another one has other parameters.
PUBLISHED = {"process": "edm", "embedding": "fourier", "norm": "single"}


@registry.register("experiment.exports", "edm2")
def write(run: Run, folder: str) -> Written:
  """Writes edm2.safetensors, by the names and in the layout of NVlabs/edm2.

  Args:
    run: the run.
    folder: where.

  Raises:
    UserError: the network is not EDM2's.
  """
  model = run.stored.model
  if model.name != "edm2":
    raise UserError(
      f"config.export.format='edm2': the run has the network {model.name!r}, not 'edm2'"
    )
  for field, value in PUBLISHED.items():
    if model[field] != value:
      raise UserError(
        f"config.export.format='edm2': the run has model.{field}={model[field]!r}; "
        f"EDM2's code has only {value!r}"
      )
  tensors = edm2.to_state_dict(run.merged, run.experiment.dataset.shape[0])
  safetensors_file.write(os.path.join(folder, FILE), tensors, {"format": "pt"})
  usage = f"""`net` is the `training.networks_edm2.Precond` of <https://github.com/NVlabs/edm2> of this
size:

```python
from safetensors.torch import load_file

net.load_state_dict(load_file("{FILE}"))
```
"""
  return Written("EDM2's state dict", usage)
