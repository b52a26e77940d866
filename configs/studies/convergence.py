"""Study: quality against compute, as a fraction of the teacher's.

  python -m sdiff_jax.main --config=configs/studies/convergence.py

Variants: `unet`, a small U-Net, `paper`, the paper's sizes, and `tiny`, seconds of work.
"""

from sdiff_jax.experiment import studies

HEUN = "evaluate.samplers=('heun/16',)"


def get_config(variant: str = ""):
  files, changes = studies.parse_variant(variant)
  runs = {
    "teacher": studies.run(files.format("diffusion"), HEUN),
    "sCD": studies.run(files.format("scd"), teacher="teacher", checkpoints=True),
  }
  return studies.build(
    "convergence",
    runs,
    title="What distillation costs",
    lead="Distance of sCD against training FLOPs, both divided by its teacher's.",
    x="compute",
    panels=("ratio",),
    log="y",
    changes=changes,
  )
