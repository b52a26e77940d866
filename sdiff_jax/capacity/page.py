"""A rehearsal as a table and as an HTML page, in units that people read.

Tables are Markdown and HTML of a few lines each; a template engine or a table library
would not shorten them.
"""

import shlex
from html import escape

from sdiff_jax.capacity import chips, report, roofline
from sdiff_jax.reports import html as html_lib
from sdiff_jax.types import Json

NOTE = "modeled, not measured"
COLUMNS = (  # header, description
  ("Pod", "name of the topology"),
  ("Chips", "number of chips; a tpu7x chip is two devices"),
  ("Changed", "config fields that were changed so that the program fits"),
  ("Fits", "memory that is used and memory of a device"),
  ("Ideal", f"time of a step: {roofline.IDEAL}"),
  ("Estimate", f"time of a step: {roofline.FORMULA}"),
  ("Measured", "time of a step on this kind of chip, where there is one"),
  ("Images/s", "by the best time that is known: measured, else estimate"),
  ("Of peak", "F_model / (t chips peak), by that time"),
  ("Run", "until the last training step, or of 1,000 images, by that time"),
)
_SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
_TIMES = ((86400, "days"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (0, "µs"))


def size(number: float) -> str:
  """Returns a number of bytes in a unit that fits it.

  Example:
    >>> size(1_176_294_664), size(0)
    ('1.18 GB', '0 B')
  """
  unit, name = next((u for u in _SIZES if number >= u[0]), _SIZES[-1])
  return f"{number / unit:.3g} {name}"


def duration(seconds: float) -> str:
  """Returns a time in a unit that fits it.

  Example:
    >>> duration(0.0726), duration(200_000)
    ('72.6 ms', '2.31 days')
  """
  unit, name = next(u for u in _TIMES if seconds >= u[0])
  return f"{seconds / (unit or 1e-6):.3g} {name}"


def best(pod_report: dict[str, Json]) -> str:
  """Returns which of the times of a report is the best that is known."""
  return next(n for n in reversed(report.TIMES) if n in pod_report["seconds"])


def verdict(pod_report: dict[str, Json]) -> str:
  """Returns whether the program fits, how long it takes and costs, in one sentence."""
  name, used = pod_report["pod"], size(pod_report["used"])
  capacity, changes = size(pod_report["capacity"]), _changes(pod_report)
  if not pod_report["fits"]:
    return (
      f"Does not fit {name}: {used} of {capacity} of a device, with the last change "
      f"that was tried ({changes}). Take a larger pod, or a smaller batch."
    )
  line = f"Fits {name}: {used} of {capacity} of a device"
  line += "." if changes == "nothing" else f", with {changes}."
  if "seconds" not in pod_report:
    return line
  kind, time = best(pod_report), pod_report["seconds"][best(pod_report)]
  calibrated = pod_report["efficiency"]["is_calibrated"]
  how = {"measured": "measured"}.get(
    kind, "estimated" if calibrated else "estimated, uncalibrated"
  )
  line += f" A step takes {duration(time)} ({how})"
  if pod_report["kind"] == "train":
    run = duration(pod_report["days"][kind] * 86400)
    line += f", {pod_report['steps']:,} steps {run}"
  else:
    line += f", 1,000 images {duration(1000 / pod_report['images_per_second'][kind])}"
  if pod_report["dollars"]:
    line += f", {pod_report['dollars']:,.2f} dollars"
  return f"{line}."


def _changes(pod_report: dict[str, Json]) -> str:
  changes = dict(pod_report["attempts"][-1]["changes"])
  if pod_report["pod"] != pod_report["requested"]:
    changes["rehearse.topology"] = pod_report["pod"]
  return _text(changes)


def cells(pod_report: dict[str, Json]) -> list[str]:
  """Returns the cells of a pod in the table, in the order of COLUMNS."""
  memory = f"{size(pod_report['used'])} of {size(pod_report['capacity'])}"
  row = [pod_report["requested"], str(pod_report["chips"]), _changes(pod_report)]
  row += [memory if pod_report["fits"] else f"no, {memory}"]
  if "seconds" not in pod_report:
    return row + ["-"] * (len(COLUMNS) - len(row))
  name, seconds = best(pod_report), pod_report["seconds"]
  row += [duration(seconds[n]) if n in seconds else "-" for n in report.TIMES]
  rate = pod_report["images_per_second"][name]
  row += [f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"]
  run = 86400 * pod_report["days"][name] if pod_report["days"] else 1000 / rate
  return [*row, f"{pod_report['utilization'][name]:.1%}", duration(run)]


def table(pods: list[dict[str, Json]]) -> str:
  """Returns the pods as a Markdown table, with a verdict on each."""
  lines = [[c[0] for c in COLUMNS], ["---"] * len(COLUMNS), *map(cells, pods)]
  rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
  return "\n".join([rows, f"({NOTE})", *map(verdict, pods)])


def html(pods: list[dict[str, Json]], command: list[str]) -> str:
  """Returns a self-contained page about pods.

  Args:
    pods: results of `report.model`.
    command: arguments of the command line.
  """
  line = shlex.join(["python", "-m", "sdiff_jax.main", *command])
  body = html_lib.table([c[0] for c in COLUMNS], [cells(pod) for pod in pods])
  body += _meanings(COLUMNS)
  body += "".join(_section(pod) for pod in pods)
  body += f"<h2>Command</h2><pre>{escape(line)}</pre>\n"
  names = ", ".join(pod["requested"] for pod in pods)
  lead = " ".join(map(verdict, pods)) + (
    " The program was compiled for these devices without using them: memory, kernels "
    "and collectives are those of the compiled program. Estimates are modeled, not "
    "measured."
  )
  return html_lib.TEMPLATE.substitute(
    title=escape(f"Rehearsal for {names}"), lead=escape(lead), body=body
  )


def _section(pod_report: dict[str, Json]) -> str:
  """Returns the section of a pod."""
  out = f"<h2>{escape(pod_report['pod'])}</h2>\n"
  out += html_lib.table(["Whole pod", ""], _whole(pod_report))
  out += "<h3>Memory of a device</h3>\n"
  kinds = dict(pod_report["persistent_bytes"])
  if "memory" in pod_report:
    kinds["activations and temporaries"] = pod_report["memory"]["temporaries"]
    kinds["outputs that are not arguments"] = pod_report["memory"]["outputs"]
    kinds["program"] = pod_report["memory"]["program"]
  kinds["memory of the device"] = pod_report["capacity"]
  out += html_lib.table(["Kind", "Size"], [[k, size(v)] for k, v in kinds.items()])
  attempts = [
    [a["pod"], _text(a["changes"]), size(a["bytes"]), a.get("error", "")]
    for a in pod_report["attempts"]
  ]
  out += "<h3>Attempts</h3>\n" + html_lib.table(
    ["Pod", "Changed", "Memory", "Error"], attempts
  )
  return out + _compiled(pod_report) if "seconds" in pod_report else out


def _whole(pod_report: dict[str, Json]) -> list[list[str]]:
  """Returns the rows about the whole pod."""
  program, trains = pod_report["program"], pod_report["kind"] == "train"
  rows = [
    ["parameters", f"{program['num_parameters']:,}"],
    ["images in a step" if trains else "images", f"{program['num_images']:,g}"],
    ["runs of the program for them", f"{program['calls_per_batch']:,g}"],
  ]
  if "seconds" not in pod_report:
    return rows
  rows.append(["operations of the model, F_model", f"{pod_report['model_flops']:.4g}"])
  rows.append(["hosts", str(pod_report["hosts"])])
  if trains:
    checkpoint = pod_report["checkpoint"]
    rows += [
      [
        "images that each host reads",
        f"{pod_report['images_read_per_host']:,.0f} a second",
      ],
      ["checkpoint", size(checkpoint["bytes"])],
      [
        f"time to write one, at {size(report.CHECKPOINT_RATE)} a second and host, assumed",
        duration(checkpoint["seconds"]),
      ],
    ]
  if pod_report["dollars"]:
    what = "run" if trains else "1,000 images"
    rows.append([f"price of the {what}", f"{pod_report['dollars']:,.2f} dollars"])
  rows.append(["compilation here", duration(pod_report["compile_seconds"])])
  return rows


def _compiled(pod_report: dict[str, Json]) -> str:
  """Returns times, kernels and collectives of the compiled program."""
  terms, efficiency = pod_report["terms"], pod_report["efficiency"]
  rows = [[k, duration(v)] for k, v in terms.items() if k != "ideal"]
  rows += [[k, duration(v)] for k, v in pod_report["seconds"].items()]
  out = "<h3>Time of a step</h3>\n" + html_lib.table(["Term", "Time"], rows)
  if known := pod_report["measurement"]:
    out += f"<p>Measured: {escape(known['note'])}.</p>\n"
  rows = [
    [kind, f"{k['kernels']:,}", f"{k['flops'] / 1e12:.3f}", size(k["bytes"])]
    for kind, k in pod_report["kernels"].items()
  ]
  header = ["Kind", "Number", "TFLOP", "Memory traffic"]
  out += "<h3>Kernels of a step</h3>\n" + html_lib.table(header, rows)
  rows = [
    [
      c["origin"] or "not named",
      f"{c['kernels']:,}",
      size(c["bytes"]),
      duration(c["seconds"]),
    ]
    for c in pod_report["costliest"]
  ]
  header = ["Source", "Kernels", "Memory traffic", "Estimate"]
  out += "<h3>Costliest sources</h3>\n" + html_lib.table(header, rows)
  rows = [
    [c["kind"], c["dtype"], str(c["group_size"]), _where(c), str(n), size(b), size(r)]
    for c, n, b, r in _sum_by_kind(pod_report["collectives"])
  ]
  header = ["Kind", "Type", "Devices", "Over", "Calls", "Size", "Sent by one device"]
  out += "<h3>Collectives of a step</h3>\n" + html_lib.table(header, rows)
  chip = chips.CHIPS[chips.parse(pod_report["pod"]).chip]
  rows = [
    ["peak, bfloat16", f"{chip.peak / 1e12:.4g} TFLOP/s"],
    ["memory", size(chip.memory)],
    ["memory bandwidth", f"{size(chip.memory_rate)}/s"],
    ["links of a ring", f"{size(chip.link * chip.links)}/s"],
    [f"beyond {chip.island} chips, and between slices", f"{size(chip.network)}/s"],
    ["source", chip.source],
    ["launch of a kernel", duration(efficiency["launch"])],
    *(
      [f"efficiency of {k}", f"{efficiency[k]:.2f}"]
      for k in ("memory", "convolution", "product")
    ),
    ["source of launch and efficiencies", efficiency["source"]],
  ]
  return out + "<h3>Data sheet of the chip</h3>\n" + html_lib.table(["", ""], rows)


def _where(collective: dict[str, Json]) -> str:
  return "network" if collective["between_slices"] else "links"


def _sum_by_kind(collectives: list[dict[str, Json]]) -> list[tuple]:
  """Returns (a collective, calls, bytes, ring bytes) for each kind, type and group."""
  sums: dict[tuple, list] = {}
  for c in collectives:
    names = ("kind", "dtype", "group_size", "between_slices")
    total = sums.setdefault(tuple(c[n] for n in names), [c, 0, 0, 0.0])
    total[1] += c["calls"]
    total[2] += c["calls"] * c["bytes"]
    total[3] += c["calls"] * c["ring_bytes"]
  return sorted((tuple(s) for s in sums.values()), key=lambda s: -s[3])


def _text(changes: dict[str, Json]) -> str:
  return ", ".join(f"{k}={v}" for k, v in changes.items()) or "nothing"


def _meanings(columns: tuple) -> str:
  pairs = "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>\n" for a, b in columns)
  return f'<dl class="meanings">\n{pairs}</dl>\n'
