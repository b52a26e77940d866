"""Study: score distillation and guidance, figure 7 of arXiv:2410.11081.

  python -m sdiff_jax.main --config=configs/studies/vsd.py

Variants: `unet`, a small U-Net, `paper`, the paper's sizes, and `tiny`, seconds of work.
"""

import itertools

from sdiff_jax.experiment import studies

HEUN = "evaluate.samplers=('heun/16',)"


def get_config(variant: str = ""):
  files, changes = studies.parse_variant(variant)
  scales = (1.0, 1.5, 2.0)
  students = {
    "guided_sCD": (),
    "guided_VSD": ("loss=vsd", "loss.consistency=False"),
    "guided_sCD_and_VSD": ("loss=vsd",),
  }
  guided = ("loss.guidance=(1.0, 2.0)", "model.guidance=True")
  runs = {"teacher": studies.run(files.format("diffusion"), HEUN)}
  for name, fields in students.items():
    runs[name] = studies.run(files.format("scd"), *fields, *guided, teacher="teacher")
  for scale in scales:
    runs[f"teacher_{scale:g}"] = studies.run(
      files.format("diffusion"),
      HEUN,
      f"sample.guidance={scale}",
      weights="teacher",
      series="teacher",
      guidance=scale,
    )
  for name, fields in students.items():
    for steps, scale in itertools.product((1, 2), scales):
      label = name.removeprefix("guided_").replace("_and_", " + ")
      runs[f"{name}_{steps}_{scale:g}"] = studies.run(
        files.format("scd"),
        *fields,
        *guided,
        f"sample.guidance={scale}",
        f"evaluate.samplers=('consistency/{steps}',)",
        teacher="teacher",
        weights=name,
        series=f"{label}, {steps} step{'s' * (steps > 1)}",
        guidance=scale,
      )
  return studies.build(
    "vsd",
    runs,
    title="Score distillation and guidance",
    lead="Distance, precision and recall against the scale of guidance: the teacher, "
    "and one and two steps of sCD, VSD and both.",
    x="guidance",
    panels=("frechet", "precision", "recall"),
    changes=changes,
  )
