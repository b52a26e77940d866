"""What a rehearsal found: modelled times of its facts, a cache, a table and a page."""

import contextlib
import hashlib
import json
import os
import pathlib
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from html import escape
from typing import Any

import jax
import jaxlib

from sdiff_jax.capacity import chips, roofline
from sdiff_jax.capacity.hlo import Collective
from sdiff_jax.io import file_io
from sdiff_jax.reports import html as html_lib

FOLDER = "~/.cache/sdiff_jax/rehearsals"
TICK = 30  # seconds between signs of life
NOTE = "modelled, not measured"


def key(described: dict[str, Any], pod: str, level: str) -> str:
  """Returns the name of a program's facts: what makes it, and what compiles it."""
  # Any change of the package may change the program.
  files = sorted(pathlib.Path(__file__).parents[1].rglob("*.py"))
  code = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
  made = {"program": described, "pod": pod, "level": level, "code": code}
  made["versions"] = [jax.__version__, jaxlib.__version__, chips.compiler(pod)]
  return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:24]


def _path(name: str) -> str:
  return os.path.join(os.path.expanduser(FOLDER), f"{name}.json")


def load(name: str) -> dict[str, Any] | None:
  """Returns the facts that were kept under a key, None if there are none."""
  try:
    with open(_path(name), encoding="utf-8") as file:
      return json.load(file)
  except (FileNotFoundError, json.JSONDecodeError):
    return None


def keep(name: str, facts: dict[str, Any]) -> None:
  """Keeps facts for the next run, whole or not at all."""
  os.makedirs(os.path.dirname(_path(name)), exist_ok=True)
  file_io.write_text(_path(name), json.dumps(facts))


@contextlib.contextmanager
def progress(name: str, say: Callable[[str], None]) -> Iterator[None]:
  """Says now and then that work goes on."""
  done, begin = threading.Event(), time.monotonic()

  def tick() -> None:
    while not done.wait(TICK):
      say(f"compiling for {name}, {time.monotonic() - begin:.0f} s")

  say(f"compiling for {name}; a large network takes minutes")
  thread = threading.Thread(target=tick, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def capacity(pod: str, devices: int) -> float:
  """Returns the bytes of memory of one device."""
  parsed = chips.parse(pod)
  return chips.CHIPS[parsed.chip].memory * parsed.chips / devices


def used(facts: dict[str, Any]) -> int:
  """Returns the bytes that one device needs: arguments, temporaries, the program.

  Where nothing was compiled, what is held from step to step alone.
  """
  memory = facts.get("memory") or {}
  names = ("arguments", "temporaries", "outputs", "program")
  return sum(memory.get(n, 0) for n in names) or sum(facts["held"].values())


def fits(facts: dict[str, Any]) -> bool:
  """Returns whether a compiled program fits into a device's memory."""
  room = capacity(facts["pod"], facts["devices"])
  return "refused" not in facts and used(facts) <= room


def modelled(
  what: str, steps: int, program: dict[str, Any], tried: list[dict[str, Any]]
) -> dict[str, Any]:
  """Returns what a page shows of a pod.

  Args:
    what: "train" or "sample".
    steps: of the whole training.
    program: its parameters, images and repeats.
    tried: facts of each attempt, with its pod and changes; the last one counts.
  """
  last = tried[-1]
  pod, devices = chips.parse(last["pod"]), last["devices"]
  chip, cores = chips.CHIPS[pod.chip], devices // pod.chips
  found = {
    "pod": pod.name,
    "asked": tried[0]["pod"],
    "chips": pod.chips,
    "devices": devices,
    "what": what,
    "note": NOTE,
    "program": program,
    "tried": [
      {"pod": t["pod"], "changes": t["changes"], "bytes": used(t), "fits": fits(t)}
      | {k: t[k] for k in ("refused",) if k in t}
      for t in tried
    ],
    "fits": fits(last),
    "capacity": capacity(pod.name, devices),
    "used": used(last),
    "held": last["held"],
  }
  if "memory" not in last:
    return found
  every = [Collective(**c) for c in last["collectives"]]
  taken = roofline.time(
    chip,
    pod.chips,
    flops=last["flops"],
    memory=last["bytes"] or 0.0,
    collectives=every,
    cores=cores,
  )
  per_batch = {n: getattr(taken, n) * program["repeats"] for n in ROOFS}
  total = last["model_flops"] * program["repeats"]
  return found | {
    "memory": last["memory"],
    "activations": last["memory"]["temporaries"],
    "model_flops": last["model_flops"],
    "flops": last["flops"],
    "bytes": last["bytes"],
    "collectives": [c._asdict() | {"ring": c.ring} for c in every],
    "ring": sum(c.times * c.ring for c in every),
    "seconds": taken._asdict() | {n: getattr(taken, n) for n in ROOFS},
    "images_per_second": {n: program["images"] / t for n, t in per_batch.items()},
    "utilisation": {
      n: roofline.utilisation(total, t, chip, pod.chips) for n, t in per_batch.items()
    },
    "days": {n: steps * t / 86400 for n, t in per_batch.items()}
    if what == "train"
    else None,
    "compile_seconds": last["compile_seconds"],
  }


ROOFS = ("overlapped", "in_turn")
_BOTH = "overlapped / in turn"
COLUMNS = (  # header, and what the column means
  ("Pod", "the name of config.rehearse.topology"),
  ("Chips", "chips; a v4 or tpu7x chip is two devices"),
  ("Changed", "what was changed to make it fit"),
  ("Fits", "memory of a device that is used, of what it has, GB"),
  ("TFLOP", "operations of one device in a step, with those done again by remat"),
  ("GB", "bytes of memory that one device reads and writes in a step"),
  ("Sent, MB", "bytes that one device sends in a step if rings carry out collectives"),
  ("Step, ms", f"{_BOTH}: {roofline.FORMULA}"),
  ("Images/s", _BOTH),
  ("Of peak", f"{_BOTH}: F_model / (t chips peak)"),
  ("Days", f"{_BOTH}: to the last step of config.train.steps"),
)


def cells(found: dict[str, Any]) -> list[str]:
  """Returns a row of the table."""
  changes = {k: v for t in found["tried"][-1:] for k, v in t["changes"].items()}
  if found["pod"] != found["asked"]:
    changes["pod"] = found["pod"]
  words = ", ".join(f"{k}={v}" for k, v in changes.items()) or "nothing"
  room = f"{found['used'] / 1e9:.2f} of {found['capacity'] / 1e9:.1f}"
  row = [found["asked"], str(found["chips"]), words]
  row += [room if found["fits"] else f"no, {room}"]
  if "seconds" not in found:
    return row + ["-"] * (len(COLUMNS) - len(row))

  def both(values: dict[str, float] | None, form: str) -> str:
    return " / ".join(form.format(values[n]) for n in ROOFS) if values else "-"

  rate = "{:,.0f}" if found["images_per_second"]["in_turn"] >= 100 else "{:.3g}"

  milliseconds = {n: found["seconds"][n] * 1e3 for n in ROOFS}
  memory = f"{found['bytes'] / 1e9:.1f}" if found["bytes"] else "unknown"
  row += [f"{found['flops'] / 1e12:.3f}", memory, f"{found['ring'] / 1e6:.1f}"]
  row += [both(milliseconds, "{:.1f}"), both(found["images_per_second"], rate)]
  return [*row, both(found["utilisation"], "{:.1%}"), both(found["days"], "{:.2f}")]


def table(rows: list[dict[str, Any]]) -> str:
  """Returns the pods as a Markdown table."""
  lines = [[c[0] for c in COLUMNS], ["---"] * len(COLUMNS), *map(cells, rows)]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n({NOTE})"


def html(rows: list[dict[str, Any]], command: list[str]) -> str:
  """Returns one self-contained page about pods."""
  line = shlex.join(["python", "-m", "sdiff_jax.main", *command])
  body = html_lib.table([c[0] for c in COLUMNS], [cells(row) for row in rows])
  body += _meanings(COLUMNS)
  body += "".join(_pod(row) for row in rows)
  body += f"<h2>Again</h2><pre>{escape(line)}</pre>\n"
  names = ", ".join(row["asked"] for row in rows)
  lead = (
    "The step was compiled for devices that are not here. Memory, operations and "
    "collectives are the compiler's; times are modelled, not measured: "
    f"{roofline.FORMULA}, F operations, M bytes of memory traffic and R bytes sent on "
    "rings, of one device."
  )
  return html_lib.TEMPLATE.substitute(
    title=escape(f"Rehearsal for {names}"), lead=escape(lead), body=body
  )


def _pod(found: dict[str, Any]) -> str:
  """Returns the section of a pod."""
  chip = chips.CHIPS[chips.parse(found["pod"]).chip]
  program, ops = found["program"], found.get("model_flops", 0.0)
  out = f"<h2>{escape(found['pod'])}</h2>\n"
  out += html_lib.table(
    ["Of the whole pod", ""],
    [
      ["parameters", f"{program['parameters']:,}"],
      [
        "images a step" if found["what"] == "train" else "images",
        _n(program["images"]),
      ],
      ["runs of the program for them", _n(program["repeats"])],
      ["operations of the model, F_model", f"{ops:.4g}"],
    ],
  )
  out += "<h3>Memory of a device</h3>\n"
  kinds = dict(found["held"])
  if "memory" in found:
    kinds["activations and temporaries"] = found["memory"]["temporaries"]
    kinds["outputs beside the state"] = found["memory"]["outputs"]
    kinds["program"] = found["memory"]["program"]
  kinds["has"] = found["capacity"]
  out += html_lib.table(["Kind", "Bytes"], [[k, f"{v:,.0f}"] for k, v in kinds.items()])
  tried = [
    [t["pod"], _words(t["changes"]), f"{t['bytes']:,}", t.get("refused", "")]
    for t in found["tried"]
  ]
  out += "<h3>Tried</h3>\n" + html_lib.table(
    ["Pod", "Changed", "Bytes", "Refused"], tried
  )
  if "seconds" not in found:
    return out
  seconds = [[k, f"{v * 1e3:.3f} ms"] for k, v in found["seconds"].items()]
  if found["bytes"] is None:
    seconds[1][1] = "unknown, left out: the compiler counts no bytes"
  out += f"<h3>Time, {NOTE}</h3>\n" + html_lib.table(["Term", "A step"], seconds)
  sent = [
    [c["kind"], c["dtype"], str(c["group"]), str(n), f"{b:,}", f"{r:,.0f}"]
    for c, n, b, r in _summed(found["collectives"])
  ]
  header = ["Kind", "Type", "Devices", "Calls", "Bytes", "Sent by one device"]
  out += "<h3>Collectives of a step</h3>\n" + html_lib.table(header, sent)
  facts = [
    ["peak, bfloat16 operations a second", f"{chip.peak:.4g}"],
    ["memory, bytes", f"{chip.memory:.4g}"],
    ["memory, bytes a second", f"{chip.memory_rate:.4g}"],
    ["links of a ring, bytes a second", f"{chip.link * chip.links:.4g}"],
    [f"beyond {chip.island} chips, bytes a second", f"{chip.network:.4g}"],
    ["source", chip.source],
  ]
  return (
    out + "<h3>The chip, as its maker says</h3>\n" + html_lib.table(["", ""], facts)
  )


def _n(number: float) -> str:
  return f"{number:,g}"


def _summed(collectives: list[dict[str, Any]]) -> list[tuple]:
  """Returns (one of them, calls, bytes, ring bytes) of each kind, type and group."""
  sums: dict[tuple, list] = {}
  for c in collectives:
    have = sums.setdefault((c["kind"], c["dtype"], c["group"]), [c, 0, 0, 0.0])
    have[1] += c["times"]
    have[2] += c["times"] * c["bytes"]
    have[3] += c["times"] * c["ring"]
  return sorted((tuple(s) for s in sums.values()), key=lambda s: -s[3])


def _words(changes: dict[str, Any]) -> str:
  return ", ".join(f"{k}={v}" for k, v in changes.items()) or "nothing"


def _meanings(columns: tuple) -> str:
  pairs = "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>\n" for a, b in columns)
  return f'<dl class="meanings">\n{pairs}</dl>\n'
