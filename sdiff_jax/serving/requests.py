"""What clients may ask, with bounds, and how a request becomes rows of a lane."""

from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from sdiff_jax.serving.lanes import Lane, Rows
from sdiff_jax.serving.models import Key, Model

MAX_BODY = 1 << 18  # bytes
MAX_SEED = 2**31 - 1
MAX_IMAGES = 256
MAX_PROMPT = 1000  # characters
MAX_GUIDANCE = 1000.0
MAX_VALUE = 1e6  # of a robot's state

Seed = Annotated[int, Meta(ge=0, le=MAX_SEED)]
Name = Annotated[str, Meta(max_length=100)]
Milliseconds = Annotated[float, Meta(gt=0, le=600_000)]
Number = Annotated[float, Meta(ge=-MAX_VALUE, le=MAX_VALUE)]
State = Annotated[list[Number], Meta(min_length=1, max_length=1000)]


class Refused(Exception):
  """A request that cannot be met, whatever the load.

  Attributes:
    status: of HTTP.
    kind: one word for programs.
  """

  def __init__(self, message: str, status: int = 422, kind: str = "invalid"):
    """Stores the error.

    Args:
      message: for people; it starts with the name of the field.
      status: of HTTP.
      kind: one word for programs.
    """
    super().__init__(message)
    self.status, self.kind = status, kind


class ImageRequest(
  msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True
):
  """Images by a model: one for each seed.

  Attributes:
    model: its name; "" for the first one.
    seed: of one image; an image depends on its seed alone.
    seeds: of several images, instead of `seed`.
    label: class of all images; null for class seed modulo the number of classes.
    prompt: text of all images, of models that take one.
    sampler: its name; "" for the model's own.
    steps: number of its steps; 0 for the first of that sampler.
    guidance: scale of classifier-free guidance; 1 is none.
    format: "png" is one image, "npz" has arr_0 uint8 [n, H, W, C] and arr_1 classes,
      and "json" has base64 PNGs with their cost.
    deadline_ms: the answer must be there after so many milliseconds, or is refused.
  """

  model: Name = ""
  seed: Seed | None = None
  seeds: Annotated[list[Seed], Meta(min_length=1, max_length=MAX_IMAGES)] | None = None
  label: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
  prompt: Annotated[str, Meta(max_length=MAX_PROMPT)] = ""
  sampler: Name = ""
  steps: Annotated[int, Meta(ge=0, le=100_000)] = 0
  guidance: Annotated[float, Meta(ge=0, le=MAX_GUIDANCE)] = 1.0
  format: Literal["png", "npz", "json"] = "png"
  deadline_ms: Milliseconds | None = None


class WatchRequest(
  msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True
):
  """One image, whose passes are sent as they come.

  Attributes:
    model: its name; "" for the first one that can be watched.
    seed: of the image.
    label: class; null for class seed modulo the number of classes.
    prompt: text, of models that take one.
    guidance: scale of classifier-free guidance; 1 is none.
  """

  model: Name = ""
  seed: Seed = 0
  label: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
  prompt: Annotated[str, Meta(max_length=MAX_PROMPT)] = ""
  guidance: Annotated[float, Meta(ge=0, le=MAX_GUIDANCE)] = 1.0


class ActionRequest(
  msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True
):
  """Actions by a policy, for one robot.

  Attributes:
    model: its name; "" for the first policy.
    states: up to now, the last of them now, [K, S].
    seed: of the noise that the actions are sampled from.
    sampler: its name; "" for the policy's own.
    steps: number of its steps; 0 for the first of that sampler.
    max_passes: largest number of sequential calls of the network; 0 for any.
    deadline_ms: the answer must be there after so many milliseconds, or is refused; a
      parallel sampler makes no more passes than fit.
  """

  states: Annotated[list[State], Meta(min_length=1, max_length=1000)]
  model: Name = ""
  seed: Seed = 0
  sampler: Name = ""
  steps: Annotated[int, Meta(ge=0, le=100_000)] = 0
  max_passes: Annotated[int, Meta(ge=0, le=100_000)] = 0
  deadline_ms: Milliseconds | None = None


def find(models: dict[str, Model], name: str, makes: str) -> Model:
  """Returns the model of a request.

  Args:
    models: by name.
    name: of the request; "" for the first one.
    makes: "images" or "actions".

  Raises:
    Refused: there is none.
  """
  known = {k: model for k, model in models.items() if model.makes == makes}
  if not name and known:
    return next(iter(known.values()))
  if name not in known:
    raise Refused(f"model: none of {_list(known)} makes {makes}", 404, "unknown")
  return known[name]


def lane_key(model: Model, request: ImageRequest | ActionRequest, **more: int) -> Key:
  """Returns the key of the lane of a request.

  Args:
    model: of the request.
    request: names the sampler and its steps.
    **more: further fields of the key.

  Raises:
    Refused: that sampler is not compiled; the message lists those that are.
  """
  name = request.sampler or model.default.sampler
  steps = request.steps
  if not steps:
    if name == model.default.sampler:
      steps = model.default.steps
    else:
      steps = next((key.steps for key in model.lanes if key.sampler == name), 0)
  key = Key(name, steps, **more)
  if not any(key[:2] == known[:2] for known in model.lanes):
    known = _list(f"{k.sampler}/{k.steps}" for k in model.lanes)
    raise Refused(f"sampler, steps: {name}/{steps} is not compiled; there are {known}")
  return key


def images(model: Model, request: ImageRequest) -> tuple[Lane, Rows]:
  """Returns the lane and the rows of a request for images.

  Args:
    model: of the request.
    request: what is asked.

  Raises:
    Refused: the model does not make these images.
  """
  if (request.seed is None) == (request.seeds is None):
    raise Refused("seed, seeds: give one of them")
  seeds = [request.seed] if request.seeds is None else request.seeds
  if request.format == "png" and len(seeds) > 1:
    raise Refused('format: "png" is one image; ask for "json" or "npz"')
  key = lane_key(model, request)
  rows = conditioned(model, request, np.array(seeds, np.int32), key)
  return model.lanes[key._replace(guided="guidance" in rows)], rows


def conditioned(
  model: Model, request: ImageRequest | WatchRequest, seeds: np.ndarray, key: Key
) -> Rows:
  """Returns the rows of a request, with class, prompt and guidance.

  Args:
    model: of the request.
    request: what is asked.
    seeds: int32 [n].
    key: of the lane, whether it is guided or not.

  Raises:
    Refused: the model has no such class, takes no prompt, or no guidance.
  """
  if request.label is not None and not request.label < model.num_classes:
    classes = f"0 to {model.num_classes - 1}" if model.num_classes else "null alone"
    raise Refused(f"label: {request.label} must be {classes}")
  if request.prompt and not model.takes_prompt:
    raise Refused(f"prompt: {model.name} takes none")
  plain, guided = key._replace(guided=False), key._replace(guided=True)
  if request.guidance != 1 and guided not in model.lanes:
    raise Refused(f"guidance: {request.guidance} must be 1 for {model.name}")
  use = request.guidance != 1 or plain not in model.lanes
  return model.rows(
    seeds,
    labels=None if request.label is None else np.full(len(seeds), request.label),
    prompts=[request.prompt] * len(seeds),
    guidance=request.guidance if use else None,
  )


def actions(model: Model, request: ActionRequest) -> tuple[list[Lane], Rows]:
  """Returns the lanes that may answer a request, the most passes first, and its row.

  Args:
    model: the policy.
    request: what is asked.

  Raises:
    Refused: states of another shape, or no lane has so few passes.
  """
  steps, size = model.shape
  if len(request.states) != steps or any(len(s) != size for s in request.states):
    raise Refused(f"states: must be {steps} states of {size} numbers")
  key, most = lane_key(model, request), request.max_passes
  bounds = {k.max_passes or k.steps: k for k in model.lanes if k[:2] == key[:2]}
  allowed = [b for b in sorted(bounds, reverse=True) if not most or b <= most]
  if not allowed:
    raise Refused(
      f"max_passes: {most} must be at least {min(bounds)}, the fewest of {key.sampler}/"
      f"{key.steps}"
    )
  states = np.array([request.states], np.float32)
  rows = model.rows(np.array([request.seed], np.int32), states)
  return [model.lanes[bounds[bound]] for bound in allowed], rows


def _list(names: object) -> str:
  return ", ".join(dict.fromkeys(names)) or "the models"  # type: ignore[call-overload]
