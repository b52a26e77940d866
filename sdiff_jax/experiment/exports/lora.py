"""Format `lora`: the adapters alone, in the layout of peft and diffusers."""

import os

from sdiff_jax import registry
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment.exports import Run, Written
from sdiff_jax.models.layers import lora
from sdiff_jax.pretrained.diffusers import fit, hub, loading, lora_file
from sdiff_jax.types import UserError


@registry.register("experiment.exports", "lora")
def write(run: Run, folder: str) -> Written:
  """Writes pytorch_lora_weights.safetensors, for the published folder of the run.

  Args:
    run: the run, whose network is `pretrained` with adapters.
    folder: where.

  Raises:
    UserError: the run has no adapters, or its network is none of diffusers'.
  """
  if not run.stored.lora.rank or run.stored.model.name != "pretrained":
    raise UserError(
      "config.export.format='lora': needs a run with lora.rank above 0 and "
      "model='pretrained'"
    )
  source = run.config.model.folder
  configs = loading.configs(source)
  part = next(name for name in fit.PREDICTORS if name in configs)
  path = os.path.join(folder, lora_file.FILE)
  scale = experiments.lora_scale(run.stored)
  lora_file.save(path, run.params[lora.LORA], part=part, scale=scale)
  name = source.removeprefix(hub.HUB)
  usage = f"""```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}")
pipe.load_lora_weights(".", weight_name="{lora_file.FILE}")
```

With the scheduler of the format `diffusers`. Here:

```
python -m sdiff_jax.main --config=FILE --job=generate --config.generate.lora={lora_file.FILE}
```
"""
  fields = {"library_name": "diffusers", "tags": "[lora]"}
  return Written("adapters of diffusers", usage, fields)
