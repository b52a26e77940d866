"""Study: parallel samplers over tolerances and windows, against the sequential sampler.

  python -m sdiff_jax.main --config=configs/studies/parallel.py

Variants: `unet`, a small U-Net, `paper`, the paper's sizes, and `tiny`, seconds of work.
"""

from sdiff_jax.experiment import studies

SOLVERS = {  # series -> sampler, steps
  "ParaDDPM, 100": ("paraddpm", 100),
  "ParaDDIM, 50": ("paraddim", 50),
  "ParaDPMSolver, 50": ("paradpmsolver", 50),
  "speculation, DDPM, 100": ("specddpm", 100),
}


def get_config(variant: str = ""):
  files, changes = studies.parse_variant(variant)
  runs = {"teacher": studies.run(files.format("diffusion"), drawn=False)}
  for series, (name, steps) in SOLVERS.items():
    runs[name] = studies.run(
      files.format("diffusion"),
      f"sampler.name={name}",
      f"sampler.steps={steps}",
      "sampler.window=16",
      "sample.num=16",
      weights="teacher",
      series=series,
    )
  keys = ("passes", "evaluations", "error")
  return studies.build(
    "parallel",
    runs,
    title="Parallel sampling",
    lead="ParaDiGMS and speculation on a trained network: iterations, evaluations and the "
    "difference to the sequential sampler, over tolerances with a window of 16 steps, "
    "and over windows with a tolerance of 0.1.",
    x="tolerance",
    panels=(*keys, *(("window", key) for key in keys)),
    log="xy",
    source="parallel",
    changes=changes,
  )
