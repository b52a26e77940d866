"""Study: distance against training FLOPs over sizes, figure 6 of arXiv:2410.11081.

  python -m sdiff_jax.main --config=configs/studies/scaling.py

Variants: `unet`, a small U-Net, `paper`, the paper's sizes, and `tiny`, seconds of work.
"""

from sdiff_jax.experiment import studies


def get_config(variant: str = ""):
  files, changes = studies.parse_variant(variant)
  sizes = {f"{w}": (files, f"model.width={w}") for w in (64, 128, 256, 512)}
  if variant == "unet":
    sizes = {f"{c}": (files, f"model.channels={c}") for c in (16, 32, 48, 64)}
  elif variant == "paper":
    sizes = {w: (f"configs/imagenet64_{{}}.py:{w}",) for w in ("S", "M", "L", "XL")}
  runs = {}
  for size, (files, *fields) in sizes.items():
    runs[f"teacher_{size}"] = studies.run(
      files.format("diffusion"),
      *fields,
      "evaluate.samplers=('heun/16',)",
      series="teacher",
    )
    for kind in ("scd", "sct"):
      for steps in (1, 2):
        runs[f"{kind}_{size}_{steps}"] = studies.run(
          files.format(kind),
          *fields,
          f"evaluate.samplers=('consistency/{steps}',)",
          teacher=f"teacher_{size}",
          weights=f"{kind}_{size}_1" if steps > 1 else "",
          series=f"s{kind[1:].upper()}, {steps} step{'s' * (steps > 1)}",
        )
  return studies.build(
    "scaling",
    runs,
    title="Sizes",
    lead="Distance of teacher, sCD and sCT against training FLOPs, and its ratio to the "
    "teacher's.",
    x="flops",
    panels=("frechet", "ratio"),
    log="xy",
    changes=changes,
  )
