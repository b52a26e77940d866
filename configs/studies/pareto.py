"""Study: quality against time, of solvers, parallel samplers and distillation.

  python -m sdiff_jax.main --config=configs/studies/pareto.py

Variants: `unet`, a small U-Net, `paper`, the paper's sizes, and `tiny`, seconds of work.
"""

from sdiff_jax.experiment import studies

SOLVERS = {  # series -> samplers of the teacher
  "Heun": ("heun/8", "heun/16", "heun/32"),
  "DDIM": ("ddim/8", "ddim/16", "ddim/50"),
  "DPM-Solver++": ("dpmpp2m/8", "dpmpp2m/16", "dpmpp2m/50"),
  "DDPM": ("ddpm/100",),
  "ParaDDIM": ("paraddim/16", "paraddim/50"),
  "ParaDPMSolver": ("paradpmsolver/16", "paradpmsolver/50"),
  "ParaDDPM": ("paraddpm/100",),
  "speculation, DDPM": ("specddpm/100",),
}


def get_config(variant: str = ""):
  files, changes = studies.parse_variant(variant)
  runs = {
    "teacher": studies.run(files.format("diffusion"), drawn=False),
    "sCD": studies.run(files.format("scd"), teacher="teacher", drawn=False),
  }
  for k, (series, samplers) in enumerate(SOLVERS.items()):
    runs[f"pareto_{k}"] = studies.run(
      files.format("diffusion"),
      f"evaluate.samplers={samplers}",
      weights="teacher",
      series=series,
    )
  runs["pareto_sCD"] = studies.run(
    files.format("scd"),
    "evaluate.samplers=('consistency/1', 'consistency/2', 'consistency/4')",
    teacher="teacher",
    weights="sCD",
    series="sCD",
  )
  return studies.build(
    "pareto",
    runs,
    title="Quality against time",
    lead="Distance against the time of an image, in batches and alone; the numbers are "
    "steps. Parallel samplers exchange evaluations for time if a batch does not fill "
    "the machine.",
    x="seconds",
    panels=("frechet", ("latency", "frechet")),
    log="xy",
    changes=(
      *changes,
      "evaluate.pr_num_images=0",
      "evaluate.latency=True",
      "sampler.window=16",
    ),
  )
