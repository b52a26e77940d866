"""Report of a rehearsal: modeled times, a table and an HTML page.

Tables are Markdown and HTML of a few lines each; a template engine or a table library
would not shorten them.
"""

import contextlib
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from html import escape

from sdiff_jax.capacity import chips, roofline
from sdiff_jax.capacity.hlo import Collective
from sdiff_jax.reports import html as html_lib
from sdiff_jax.types import Json

PROGRESS_SECONDS = 30  # between two lines of progress
NOTE = "modeled, not measured"


@contextlib.contextmanager
def progress(name: str, say: Callable[[str], None]) -> Iterator[None]:
  """Reports every PROGRESS_SECONDS that a compilation is running."""
  done, begin = threading.Event(), time.monotonic()

  def tick() -> None:
    while not done.wait(PROGRESS_SECONDS):
      say(f"compiling for {name}, {time.monotonic() - begin:.0f} s")

  say(f"compiling for {name}; a large network needs minutes")
  thread = threading.Thread(target=tick, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def memory_per_device(pod: str, devices: int) -> float:
  """Returns the bytes of memory of one device."""
  parsed = chips.parse(pod)
  return chips.CHIPS[parsed.chip].memory * parsed.chips / devices


def memory_use(facts: dict[str, Json]) -> int:
  """Returns the bytes that one device needs: arguments, temporaries, outputs, program.

  If nothing was compiled, only the persistent bytes are known.
  """
  memory = facts.get("memory") or {}
  names = ("arguments", "temporaries", "outputs", "program")
  return sum(memory.get(n, 0) for n in names) or sum(facts["persistent_bytes"].values())


def fits(facts: dict[str, Json]) -> bool:
  """Returns whether a compiled program fits into a device's memory."""
  available = memory_per_device(facts["pod"], facts["devices"])
  return "error" not in facts and memory_use(facts) <= available


def model(
  kind: str, steps: int, program: dict[str, Json], attempts: list[dict[str, Json]]
) -> dict[str, Json]:
  """Returns the content of the report for one pod.

  Args:
    kind: "train" or "sample".
    steps: number of training steps.
    program: `Program.summary()`.
    attempts: facts of each attempt, with `pod`, `devices`, `persistent_bytes` and
      `changes`. The times are those of the last one.
  """
  last = attempts[-1]
  pod, devices = chips.parse(last["pod"]), last["devices"]
  chip, cores = chips.CHIPS[pod.chip], devices // pod.chips
  pod_report = {
    "pod": pod.name,
    "requested": attempts[0]["pod"],
    "chips": pod.chips,
    "devices": devices,
    "kind": kind,
    "note": NOTE,
    "program": program,
    "attempts": [
      {
        "pod": a["pod"],
        "changes": a["changes"],
        "bytes": memory_use(a),
        "fits": fits(a),
      }
      | {k: a[k] for k in ("error",) if k in a}
      for a in attempts
    ],
    "fits": fits(last),
    "capacity": memory_per_device(pod.name, devices),
    "used": memory_use(last),
    "persistent_bytes": last["persistent_bytes"],
  }
  if "memory" not in last:
    return pod_report
  collectives = [Collective(**c) for c in last["collectives"]]
  seconds = roofline.time(
    chip,
    pod.chips,
    flops=last["flops"],
    memory=last["bytes"] or 0.0,
    collectives=collectives,
    cores=cores,
  )
  per_batch = {n: getattr(seconds, n) * program["calls_per_batch"] for n in ROOFS}
  total = last["model_flops"] * program["calls_per_batch"]
  return pod_report | {
    "memory": last["memory"],
    "activations": last["memory"]["temporaries"],
    "model_flops": last["model_flops"],
    "flops": last["flops"],
    "bytes": last["bytes"],
    "collectives": [c._asdict() | {"ring_bytes": c.ring_bytes} for c in collectives],
    "ring_bytes": sum(c.calls * c.ring_bytes for c in collectives),
    "seconds": seconds._asdict() | {n: getattr(seconds, n) for n in ROOFS},
    "images_per_second": {n: program["num_images"] / t for n, t in per_batch.items()},
    "utilization": {
      n: roofline.utilization(total, t, chip, pod.chips) for n, t in per_batch.items()
    },
    "days": {n: steps * t / 86400 for n, t in per_batch.items()}
    if kind == "train"
    else None,
    "compile_seconds": last["compile_seconds"],
  }


ROOFS = ("overlapped", "serial")
_BOTH = "overlapped / serial"
COLUMNS = (  # header, description
  ("Pod", "name of the topology"),
  ("Chips", "number of chips; a tpu7x chip is two devices"),
  ("Changed", "config fields that were changed so that the program fits"),
  ("Fits", "memory that is used and memory of a device, GB"),
  ("TFLOP", "operations of one device in a step, including rematerialization"),
  ("GB", "memory traffic of one device in a step"),
  ("Sent, MB", "bytes that one device sends in a step, with ring collectives"),
  ("Step, ms", f"{_BOTH}: {roofline.FORMULA}"),
  ("Images/s", _BOTH),
  ("Of peak", f"{_BOTH}: F_model / (t chips peak)"),
  ("Days", f"{_BOTH}: until the last training step"),
)


def cells(pod_report: dict[str, Json]) -> list[str]:
  """Returns the cells of a pod in the table, in the order of COLUMNS."""
  changes = dict(pod_report["attempts"][-1]["changes"])
  if pod_report["pod"] != pod_report["requested"]:
    changes["pod"] = pod_report["pod"]
  memory_text = f"{pod_report['used'] / 1e9:.2f} of {pod_report['capacity'] / 1e9:.1f}"
  row = [pod_report["requested"], str(pod_report["chips"]), _text(changes)]
  row += [memory_text if pod_report["fits"] else f"no, {memory_text}"]
  if "seconds" not in pod_report:
    return row + ["-"] * (len(COLUMNS) - len(row))

  def both(values: dict[str, float] | None, form: str) -> str:
    return " / ".join(form.format(values[n]) for n in ROOFS) if values else "-"

  rate = "{:,.0f}" if pod_report["images_per_second"]["serial"] >= 100 else "{:.3g}"

  milliseconds = {n: pod_report["seconds"][n] * 1e3 for n in ROOFS}
  memory = f"{pod_report['bytes'] / 1e9:.1f}" if pod_report["bytes"] else "unknown"
  row += [
    f"{pod_report['flops'] / 1e12:.3f}",
    memory,
    f"{pod_report['ring_bytes'] / 1e6:.1f}",
  ]
  row += [both(milliseconds, "{:.1f}"), both(pod_report["images_per_second"], rate)]
  return [
    *row,
    both(pod_report["utilization"], "{:.1%}"),
    both(pod_report["days"], "{:.2f}"),
  ]


def table(pods: list[dict[str, Json]]) -> str:
  """Returns the pods as a Markdown table."""
  lines = [[c[0] for c in COLUMNS], ["---"] * len(COLUMNS), *map(cells, pods)]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n({NOTE})"


def html(pods: list[dict[str, Json]], command: list[str]) -> str:
  """Returns a self-contained page about pods.

  Args:
    pods: results of `model`.
    command: arguments of the command line.
  """
  line = shlex.join(["python", "-m", "sdiff_jax.main", *command])
  body = html_lib.table([c[0] for c in COLUMNS], [cells(pod) for pod in pods])
  body += _meanings(COLUMNS)
  body += "".join(_section(pod) for pod in pods)
  body += f"<h2>Command</h2><pre>{escape(line)}</pre>\n"
  names = ", ".join(pod["requested"] for pod in pods)
  lead = (
    "The program was compiled for these devices without using them. Memory, operations "
    "and collectives are reported by the compiler. Times are modeled, not measured: "
    f"{roofline.FORMULA}, with F operations, M bytes of memory traffic and R bytes sent "
    "on rings, for one device."
  )
  return html_lib.TEMPLATE.substitute(
    title=escape(f"Rehearsal for {names}"), lead=escape(lead), body=body
  )


def _section(pod_report: dict[str, Json]) -> str:
  """Returns the section of a pod."""
  chip = chips.CHIPS[chips.parse(pod_report["pod"]).chip]
  program, ops = pod_report["program"], pod_report.get("model_flops", 0.0)
  out = f"<h2>{escape(pod_report['pod'])}</h2>\n"
  out += html_lib.table(
    ["Whole pod", ""],
    [
      ["parameters", f"{program['num_parameters']:,}"],
      [
        "images in a step" if pod_report["kind"] == "train" else "images",
        _n(program["num_images"]),
      ],
      ["runs of the program for them", _n(program["calls_per_batch"])],
      ["operations of the model, F_model", f"{ops:.4g}"],
    ],
  )
  out += "<h3>Memory of a device</h3>\n"
  kinds = dict(pod_report["persistent_bytes"])
  if "memory" in pod_report:
    kinds["activations and temporaries"] = pod_report["memory"]["temporaries"]
    kinds["outputs that are not arguments"] = pod_report["memory"]["outputs"]
    kinds["program"] = pod_report["memory"]["program"]
  kinds["memory of the device"] = pod_report["capacity"]
  out += html_lib.table(["Kind", "Bytes"], [[k, f"{v:,.0f}"] for k, v in kinds.items()])
  attempts = [
    [a["pod"], _text(a["changes"]), f"{a['bytes']:,}", a.get("error", "")]
    for a in pod_report["attempts"]
  ]
  out += "<h3>Attempts</h3>\n" + html_lib.table(
    ["Pod", "Changed", "Bytes", "Error"], attempts
  )
  if "seconds" not in pod_report:
    return out
  seconds = [[k, f"{v * 1e3:.3f} ms"] for k, v in pod_report["seconds"].items()]
  if pod_report["bytes"] is None:
    seconds[1][1] = "unknown and left out: the compiler does not report it"
  out += f"<h3>Time, {NOTE}</h3>\n" + html_lib.table(["Term", "One step"], seconds)
  sent = [
    [c["kind"], c["dtype"], str(c["group_size"]), str(n), f"{b:,}", f"{r:,.0f}"]
    for c, n, b, r in _sum_by_kind(pod_report["collectives"])
  ]
  header = ["Kind", "Type", "Devices", "Calls", "Bytes", "Sent by one device"]
  out += "<h3>Collectives of a step</h3>\n" + html_lib.table(header, sent)
  facts = [
    ["peak, bfloat16 operations per second", f"{chip.peak:.4g}"],
    ["memory, bytes", f"{chip.memory:.4g}"],
    ["memory bandwidth, bytes per second", f"{chip.memory_rate:.4g}"],
    ["links of a ring, bytes per second", f"{chip.link * chip.links:.4g}"],
    [f"beyond {chip.island} chips, bytes per second", f"{chip.network:.4g}"],
    ["source", chip.source],
  ]
  return out + "<h3>Data sheet of the chip</h3>\n" + html_lib.table(["", ""], facts)


def _n(number: float) -> str:
  return f"{number:,g}"


def _sum_by_kind(collectives: list[dict[str, Json]]) -> list[tuple]:
  """Returns (a collective, calls, bytes, ring bytes) for each kind, type and group."""
  sums: dict[tuple, list] = {}
  for c in collectives:
    total = sums.setdefault((c["kind"], c["dtype"], c["group_size"]), [c, 0, 0, 0.0])
    total[1] += c["calls"]
    total[2] += c["calls"] * c["bytes"]
    total[3] += c["calls"] * c["ring_bytes"]
  return sorted((tuple(s) for s in sums.values()), key=lambda s: -s[3])


def _text(changes: dict[str, Json]) -> str:
  return ", ".join(f"{k}={v}" for k, v in changes.items()) or "nothing"


def _meanings(columns: tuple) -> str:
  pairs = "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>\n" for a, b in columns)
  return f'<dl class="meanings">\n{pairs}</dl>\n'
