"""Study: discrete against continuous time, figure 5c of arXiv:2410.11081.

  python -m sdiff_jax.main --config=configs/studies/discrete_vs_continuous.py

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
  for n in (32, 128, 512, 1024, 4096):
    runs[f"dsCD_{n}"] = studies.run(
      files.format("scd"),
      "loss=scm_discrete",
      f"loss.n={n}",
      teacher="teacher",
      checkpoints=True,
    )
  return studies.build(
    "discrete_vs_continuous",
    runs,
    title="Discrete against continuous time",
    lead="sCD against the same objective over N noise levels, at the same budget.",
    x="step",
    panels=("frechet",),
    log="y",
    changes=changes,
  )
