"""Study: what stabilizes the tangent, figure 4 of arXiv:2410.11081, and what it gains.

  python -m sdiff_jax.main --config=configs/studies/stability.py

Each series lacks one of the three parts and has a teacher of its own kind. With the
variant `paper` the plain parts are EDM2's own modulation and its Fourier features.
"""

from sdiff_jax.experiment import studies

HEUN = "evaluate.samplers=('heun/16',)"
ONE = "evaluate.samplers=('consistency/1',)"


def get_config(variant: str = ""):
  files, changes = studies.parse_variant(variant)
  variants = {
    "edm_time": ("model.process=edm", "c_noise = ln(σ)/4"),
    "fourier": ("model.embedding=fourier", "Fourier features"),
    "plain_norm": ("model.norm=single", "plain modulation"),
  }
  label = "all three"
  runs = {
    "teacher": studies.run(files.format("diffusion"), HEUN, series=f"teacher, {label}"),
    "sCD": studies.run(files.format("scd"), teacher="teacher", drawn=False),
    "stable": studies.run(
      files.format("scd"),
      ONE,
      teacher="teacher",
      weights="sCD",
      series=label,
      checkpoints=True,
    ),
  }
  for name, (field, label) in variants.items():
    teacher = f"teacher_{name}"
    runs[teacher] = studies.run(
      files.format("diffusion"), field, HEUN, series=f"teacher, {label}"
    )
    runs[f"sCD_{name}"] = studies.run(
      files.format("scd"), field, ONE, teacher=teacher, series=label, checkpoints=True
    )
  return studies.build(
    "stability",
    runs,
    title="Stabilizing the tangent",
    lead="sCD with the identity time transform, positional embedding and adaptive "
    "double normalization, and without one of them: the two parts of dF/dt, and the "
    "distance of one step and of the teachers.",
    x="step",
    panels=("grad_x", "d_t", "frechet"),
    log="y",
    source="tangent",
    changes=(*changes, "evaluate.pr_num_images=0"),
  )
