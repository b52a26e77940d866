"""Score distillation: figure 7 of arXiv:2410.11081."""

from sdiff_jax import studies

HEUN = "evaluate.samplers=('heun/16',)"


def get_config(given: str = ""):
  files, changes = studies.setting(given, "configs/studies/vsd.py")
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
  measured = {
    "teacher": ("diffusion", runs["teacher"]["set"]),
    **{name: ("scd", runs[name]["set"]) for name in students},
  }
  for name, (kind, fields) in measured.items():
    for scale in scales:
      runs[f"{name}_{scale:g}"] = studies.run(
        files.format(kind),
        *fields,
        f"sample.guidance={scale}",
        *((kind == "scd") * ("evaluate.samplers=('consistency/1',)",)),
        teacher="teacher" * (kind == "scd"),
        weights=name,
        series=name.removeprefix("guided_").replace("_and_", " + "),
        value=scale,
      )
  return studies.build(
    "vsd",
    runs,
    title="Score distillation and guidance",
    lead="Distance, precision and recall against the scale of guidance: the teacher, "
    "and one step of sCD, VSD and both.",
    x="value",
    panels=("frechet", "precision", "recall"),
    changes=changes,
  )
