"""The card of an exported run, README.md: what it is, how it is used, its figures."""

from collections.abc import Mapping

from sdiff_jax.experiment.exports import Run, Written
from sdiff_jax.reports import loading, results
from sdiff_jax.reports.results import Result
from sdiff_jax.samplers import Sampler


def card(
  run: Run, written: Written, *, name: str, sampler: Sampler, workdir: str, license: str
) -> str:
  """Returns the card, Markdown with a header as the Hugging Face Hub reads it.

  Args:
    run: the run.
    written: by the format.
    name: title of the card.
    sampler: that the files are for.
    workdir: of the run, whose evaluations are the figures.
    license: of the weights; "" for none that is known.
  """
  found = loading.load(workdir)
  steps = found.training.get("steps")
  data, shape = run.stored.data.name, run.experiment.dataset.shape
  about = loading.description(found.config["loss"])
  lines = [
    *_header(dict(written.fields) | ({"license": license} if license else {})),
    f"# {name}",
    "",
    f"{found.kind}, trained on {data} with sdiff_jax"
    f"{f' for {steps:,} steps' if steps else ''}. {about}",
    f"A sample is {' x '.join(map(str, shape))}. Sampler: {sampler.name}, "
    f"{sampler.num_steps} steps.",
    "",
    *_teacher(run),
    "## Use",
    "",
    written.usage,
    *_figures(found.rows),
  ]
  return "\n".join(lines).rstrip() + "\n"


def _header(fields: Mapping[str, str]) -> list[str]:
  known = [f"{name}: {value}" for name, value in fields.items() if value]
  return ["---", *known, "---", ""] if known else []


def _teacher(run: Run) -> list[str]:
  """Returns what the run was distilled from."""
  source = run.stored.teacher.workdir or run.stored.teacher.folder
  return [f"Teacher: `{source}`.", ""] if source else []


def _figures(rows: list[Result]) -> list[str]:
  """Returns the results of the job `evaluate` as a table of Markdown."""
  if not rows:
    return []
  columns = results.used(rows, results.default_columns())
  table = [[header for header, *_ in columns], ["---"] * len(columns)]
  table += [results.cells(row, "-", columns) for row in rows]
  lines = [f"| {' | '.join(cells)} |" for cells in table]
  legend = "; ".join(f"{header}: {text}" for header, _, _, text in columns)
  return ["## Figures", "", *lines, "", f"{legend}.", ""]
