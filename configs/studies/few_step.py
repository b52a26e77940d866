"""Study: methods of few steps at equal training compute.

  python -m sdiff_jax.main --config=configs/studies/few_step.py

Every student starts from the weights of the teacher and is trained for 0.2, 0.5 and 1.0
of the teacher's floating-point operations, counted in the programs.

Variants: `digits`, a small network on 8 x 8 digits, `unet`, five of the methods on a U-Net
after 0.2 of the operations, `paper`, the paper's sizes, and `tiny`, seconds of work;
`evaluations` draws the same runs against network evaluations.
"""

import itertools
from collections.abc import Iterable

from sdiff_jax.experiment import studies, variants

BUDGETS = {0.2: 60, 0.5: 150, 1.0: 300}  # -> steps of the tangent's warm-up
STEPS = (1, 2, 4)
FROM_DATA = "loss.velocity=data"
# A switch of the loss keeps p_mean, p_std and c of sCD; the others' c has another meaning.
# Half of the samples have equal ends; with the default, three quarters, the distance in one
# step is half as large again.
AVERAGE = ("loss=meanflow", "loss.diffusion_fraction=0.5")
# More jumps to the data, which one step needs.
FLOW_MAP = ("loss=flow_map", "loss.consistency_fraction=0.25")
# Series -> solver, and changes of sCD. What else was tried: docs/guides/few-step.md.
METHODS = {
  "sCT": ("consistency", (FROM_DATA,)),
  "sCD": ("consistency", ()),
  "sCD + VSD": ("consistency", ("loss=vsd",)),
  "discrete CD": (
    "consistency",
    (
      "loss=consistency",
      "loss.velocity=teacher",
      "loss.levels=(40, 40)",
      "loss.p_mean=-1.1",
      "loss.p_std=2.0",
      "loss.c=0.00054",
    ),
  ),
  "flow map, distilled": ("flow_map", FLOW_MAP),
  "flow map, from data": ("flow_map", (*FLOW_MAP, FROM_DATA)),
  "MeanFlow": ("flow_map", (*AVERAGE, "loss.c=0.001")),
  "iMF": ("flow_map", (*AVERAGE, "loss.improved=True", "loss.c=0.01")),
  "LSD": ("flow_map", ("loss=lagrangian", FROM_DATA)),
  "FACM": ("consistency", ("loss=facm", "loss.c=0.001")),
  "rCM": ("consistency", ("loss=rcm",)),
  "CMT": ("consistency", ("loss=cmt",)),
  "sCD after CMT": ("consistency", ()),
  "flow map after CMT": ("flow_map", (*FLOW_MAP, FROM_DATA)),
}
# The best in one and two evaluations on Fashion-MNIST, of each kind.
BEST = ("sCD", "FACM", "CMT", "flow map, distilled", "flow map, from data")
# Series -> changes of sCD for the mid-training before it, of half of the budget.
MID_TRAINING = {
  "sCD after CMT": ("loss=cmt",),
  "flow map after CMT": ("loss=cmt", "loss.flow_map=True"),
}


def students(
  files: str, methods: Iterable[str], budgets: Iterable[float]
) -> dict[str, dict]:
  """Returns the runs of methods at budgets, by name."""
  runs = {}
  for budget, series in itertools.product(budgets, methods):
    solver, fields = METHODS[series]
    name = f"few_step_{series.replace(' ', '_').replace(',', '')}_{budget:g}"
    common = {"teacher": "teacher", "series": series}
    start = ""
    if series in MID_TRAINING:
      start = f"{name}_start"
      runs[start] = studies.run(
        files.format("scd"),
        *MID_TRAINING[series],
        "checkpoint.keep_every=0",
        budget=budget / 2,
        drawn=False,
        **common,
      )
    runs[name] = studies.run(
      files.format("scd"),
      f"loss.warmup_steps={BUDGETS[budget]}",
      *fields,
      f"evaluate.samplers={tuple(f'{solver}/{n}' for n in STEPS)}",
      "checkpoint.keep_every=0",
      start=start,
      budget=budget,
      **common,
    )
  return runs


def get_config(variant: str = ""):
  figure, setting = variants.parse(variant, ("", "evaluations"), studies.SETTINGS)
  files, changes = studies.SETTINGS[setting]
  methods, budgets = (BEST, (0.2,)) if setting == "unet" else (METHODS, BUDGETS)
  steps = {
    "digits": ("train.steps=4000",),
    "unet": ("train.steps=2800",),
    "tiny": ("train.steps=20",),
  }
  file, shorter = files.format("diffusion"), steps.get(setting, ())
  runs = {"teacher": studies.run(file, "evaluate.samplers=('heun/16',)", *shorter)}
  if figure:
    runs["teacher"]["series"] = "teacher, Heun"
    runs["few_step_teacher"] = studies.run(
      file,
      "evaluate.samplers=('dpmpp2m/2', 'dpmpp2m/4', 'dpmpp2m/8')",
      *shorter,
      weights="teacher",
      series="teacher, DPM-Solver++",
    )
    panels = tuple(f"frechet@budget={budget:g}" for budget in budgets)
  else:
    panels = tuple(f"ratio@evaluations={n}" for n in STEPS)
  columns = [
    f"{y}@evaluations={n}" for y in ("frechet", "precision", "recall") for n in STEPS
  ]
  return studies.build(
    f"few_step_{figure}".rstrip("_"),
    runs | students(files, methods, budgets),
    title="Methods of few steps",
    lead="Distance of every method after the same training compute, 0.2, 0.5 and 1.0 of "
    "its teacher's, in 1, 2 and 4 network evaluations.",
    x="evaluations" if figure else "compute",
    panels=panels,
    columns=() if figure else tuple(columns),
    log="xy" if figure else "y",
    changes=changes,
  )
