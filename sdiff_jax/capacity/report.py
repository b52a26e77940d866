"""The content of a rehearsal's report for one pod: memory, traffic, modeled times."""

from typing import NamedTuple

from sdiff_jax.capacity import chips, kernels, measured, roofline
from sdiff_jax.capacity.chips import Chip, Pod
from sdiff_jax.capacity.hlo import Collective
from sdiff_jax.capacity.kernels import Kernel
from sdiff_jax.capacity.roofline import Time
from sdiff_jax.types import Json

# Bytes per second that a host writes to storage, assumed.
CHECKPOINT_RATE = 1e9
COSTLIEST = 12  # sources of kernels that the report lists
TIMES = ("ideal", "estimate", "measured")


class Job(NamedTuple):
  """What a program is run for.

  Attributes:
    kind: "train" or "sample".
    steps: number of training steps.
    dollars_per_chip_hour: price; 0 if it is not known.
  """

  kind: str
  steps: int
  dollars_per_chip_hour: float = 0.0


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
  job: Job, program: dict[str, Json], attempts: list[dict[str, Json]]
) -> dict[str, Json]:
  """Returns the content of the report for one pod.

  Args:
    job: what the program is run for.
    program: `Program.summary()`.
    attempts: facts of each attempt, with `pod`, `devices`, `persistent_bytes` and
      `changes`. The times are those of the last one.
  """
  last = attempts[-1]
  pod, devices = chips.parse(last["pod"]), last["devices"]
  pod_report = {
    "pod": pod.name,
    "requested": attempts[0]["pod"],
    "chips": pod.chips,
    "devices": devices,
    "kind": job.kind,
    "steps": job.steps,
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
  times = _times(job, pod, devices, program, last)
  return pod_report | {
    "memory": last["memory"],
    "compile_seconds": last["compile_seconds"],
    **_work(pod, devices, last),
    **times,
    **_host(job, pod, devices, program, last["persistent_bytes"], times),
  }


def _work(pod: Pod, devices: int, facts: dict[str, Json]) -> dict[str, Json]:
  """Returns operations, memory traffic and communication of one device."""
  found = [Kernel(**k) for k in facts["kernels"]]
  collectives = [Collective(**c) for c in facts["collectives"]]
  by_kind = {
    kind: {
      "kernels": kernels.launches(some),
      "flops": kernels.flops(some),
      "bytes": kernels.traffic(some),
    }
    for kind in kernels.KINDS
    if (some := [k for k in found if k.kind == kind])
  }
  return {
    "model_flops": facts["model_flops"],
    "flops": facts["flops"],
    "bytes": kernels.traffic(found),
    "kernels": by_kind,
    "costliest": _costliest(pod, devices, found),
    "collectives": [c._asdict() | {"ring_bytes": c.ring_bytes} for c in collectives],
    "ring_bytes": sum(
      c.calls * c.ring_bytes for c in collectives if not c.between_slices
    ),
    "network_bytes": sum(
      c.calls * c.ring_bytes for c in collectives if c.between_slices
    ),
  }


def _time(
  pod: Pod, devices: int, found: list[Kernel], collectives: list[Collective]
) -> Time:
  """Returns the modeled time of kernels and collectives on a pod."""
  chip, efficiency = chips.CHIPS[pod.chip], chips.EFFICIENCIES[pod.chip]
  return roofline.time(
    chip,
    pod,
    efficiency,
    kernels=found,
    collectives=collectives,
    cores=devices // pod.chips,
  )


def _costliest(pod: Pod, devices: int, found: list[Kernel]) -> list[dict[str, Json]]:
  """Returns the sources whose kernels take most of the modeled time."""
  sources: dict[str, list[Kernel]] = {}
  for kernel in found:
    sources.setdefault(kernel.origin, []).append(kernel)
  rows = [
    {
      "origin": origin,
      "kernels": kernels.launches(some),
      "bytes": kernels.traffic(some),
      "seconds": _time(pod, devices, some, []).estimate,
    }
    for origin, some in sources.items()
  ]
  return sorted(rows, key=lambda row: -row["seconds"])[:COSTLIEST]


def _times(
  job: Job, pod: Pod, devices: int, program: dict[str, Json], facts: dict[str, Json]
) -> dict[str, Json]:
  """Returns the times of one run of the program, and what follows from them."""
  chip, efficiency = chips.CHIPS[pod.chip], chips.EFFICIENCIES[pod.chip]
  found = [Kernel(**k) for k in facts["kernels"]]
  time = _time(pod, devices, found, [Collective(**c) for c in facts["collectives"]])
  seconds = {"ideal": time.ideal, "estimate": time.estimate}
  known = measured.find(
    job.kind, pod.chip, program["num_parameters"], program["num_images"] / pod.chips
  )
  if known:
    seconds["measured"] = known.seconds
  calls = program["calls_per_batch"]
  total = facts["model_flops"] * calls
  return {
    "terms": time._asdict(),
    "efficiency": efficiency._asdict() | {"is_calibrated": efficiency.is_calibrated},
    "measurement": known._asdict() if known else None,
    "seconds": seconds,
    "images_per_second": {
      n: program["num_images"] / (t * calls) for n, t in seconds.items()
    },
    "utilization": {
      n: roofline.utilization(total, t * calls, chip, pod.chips)
      for n, t in seconds.items()
    },
    "days": {n: job.steps * t / 86400 for n, t in seconds.items()}
    if job.kind == "train"
    else None,
  }


def _host(
  job: Job,
  pod: Pod,
  devices: int,
  program: dict[str, Json],
  persistent_bytes: dict[str, int],
  times: dict[str, Json],
) -> dict[str, Json]:
  """Returns what hosts read and write, and the price, by the best time that is known."""
  chip: Chip = chips.CHIPS[pod.chip]
  hosts = max(pod.chips // chip.host, 1)
  best = next(n for n in reversed(TIMES) if n in times["seconds"])
  rate = times["images_per_second"][best]
  if job.kind == "train":
    hours = 24 * times["days"][best]
    held = sum(persistent_bytes[n] for n in ("parameters", "optimizer", "EMA"))
    checkpoint = {
      "bytes": program["checkpoint_bytes"],
      "seconds": held * devices / hosts / CHECKPOINT_RATE,
    }
    read = rate / hosts
  else:
    hours, checkpoint, read = 1000 / rate / 3600, None, 0.0
  return {
    "hosts": hosts,
    "checkpoint": checkpoint,
    "images_read_per_host": read,
    "dollars": pod.chips * hours * job.dollars_per_chip_hour,
  }
