"""Study: normalization of the tangent, figures 5a and 5b of arXiv:2410.11081.

  python -m sdiff_jax.main --config=configs/studies/objective.py

Variants: `unet`, a small U-Net, `paper`, the paper's sizes, and `tiny`, seconds of work.
"""

from sdiff_jax.experiment import studies

HEUN = "evaluate.samplers=('heun/16',)"


def get_config(variant: str = ""):
  files, changes = studies.parse_variant(variant)
  runs = {"teacher": studies.run(files.format("diffusion"), HEUN)}
  variants = {
    "sCD": (),
    "clipped": ("loss.tangent_normalizer=clip",),
    "untamed": ("loss.tangent_normalizer=none",),
    "sCD_weighted": ("loss.adaptive_weight=True",),
    "untamed_weighted": ("loss.tangent_normalizer=none", "loss.adaptive_weight=True"),
  }
  for name, fields in variants.items():
    runs[name] = studies.run(
      files.format("scd"), *fields, teacher="teacher", checkpoints=True
    )
  return studies.build(
    "objective",
    runs,
    title="Normalization of the tangent",
    lead="sCD with the tangent normalized, clipped or unchanged, and with an adaptive "
    "weight: distance in one and two steps over training.",
    x="step",
    panels=("frechet",),
    log="y",
    changes=changes,
  )
