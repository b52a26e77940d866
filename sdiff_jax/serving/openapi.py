"""The description of the interface: OpenAPI 3.1, from the schemas of the requests."""

import inspect
from collections.abc import Mapping

import msgspec

from sdiff_jax.serving import requests
from sdiff_jax.serving.models import Model
from sdiff_jax.types import Json

ERRORS = {
  "400": "The body is no JSON.",
  "401": "The token is missing.",
  "413": "The body is too large.",
  "422": "A field does not fit.",
  "429": "The queue is full; Retry-After says when to ask again.",
  "500": "The result is not finite, or the device failed.",
  "503": "The deadline cannot be met, or the service stops.",
}
# Path -> request, summary, type of the answer.
POSTS = {
  "/v1/images": (requests.ImageRequest, "Images by a model", "image/png"),
  "/v1/actions": (requests.ActionRequest, "Actions by a policy", "application/json"),
  "/v1/watch": (
    requests.WatchRequest,
    "An image, pass by pass, in parallel and then sequentially",
    "text/event-stream",
  ),
}
GETS = {
  "/v1/models": ("The models that are served", "application/json"),
  "/v1/runs": ("Runs while they train", "application/json"),
  "/healthz": ("Whether the service answers", "application/json"),
  "/metrics": ("Metrics for Prometheus", "text/plain"),
}


def document(models: Mapping[str, Model]) -> dict[str, Json]:
  """Returns the OpenAPI document.

  Args:
    models: that are served.

  Example:
    >>> sorted(document({})["paths"])[:2]
    ['/healthz', '/metrics']
  """
  types = [request for request, *_ in POSTS.values()]
  _, schemas = msgspec.json.schema_components(
    types, ref_template="#/components/schemas/{name}"
  )
  for request in types:
    described = _attributes(inspect.getdoc(request) or "")
    for field, text in described.items():
      schemas[request.__name__]["properties"][field]["description"] = text
  paths: dict[str, Json] = {}
  for path, (request, summary, media) in POSTS.items():
    reference = {"$ref": f"#/components/schemas/{request.__name__}"}
    body = {"required": True, "content": {"application/json": {"schema": reference}}}
    responses = {"200": {"description": summary, "content": {media: {}}}}
    responses |= {code: {"description": text} for code, text in ERRORS.items()}
    paths[path] = {
      "post": {"summary": summary, "requestBody": body, "responses": responses}
    }
  for path, (summary, media) in GETS.items():
    responses = {"200": {"description": summary, "content": {media: {}}}}
    paths[path] = {"get": {"summary": summary, "responses": responses}}
  return {
    "openapi": "3.1.0",
    "info": {"title": "sdiff_jax", "version": "1", "description": _list(models)},
    "paths": paths,
    "components": {
      "schemas": schemas,
      "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
    },
    "security": [{}, {"token": []}],
  }


def describe(model: Model) -> dict[str, Json]:
  """Returns what clients are told of a model.

  Args:
    model: that is served.
  """
  lanes: dict[tuple[str, int], dict[str, Json]] = {}
  for key, lane in model.lanes.items():
    entry = lanes.setdefault(
      key[:2],
      {
        "sampler": key.sampler,
        "steps": key.steps,
        "batch_sizes": lane.sizes,
        "max_passes": [],
        "ms": 1e3 * lane.seconds[lane.sizes[0]],
      },
    )
    if key.max_passes:
      entry["max_passes"].append(key.max_passes)
  return {
    "name": model.name,
    "title": model.title,
    "makes": model.makes,
    "classes": model.num_classes,
    "prompt": model.takes_prompt,
    "guidance": model.takes_guidance,
    "shape": model.shape,
    "samplers": [*lanes.values()],
    "watch": model.live is not None,
  }


def _attributes(doc: str) -> dict[str, str]:
  """Returns name -> text of the section "Attributes" of an unindented docstring."""
  found: dict[str, str] = {}
  for line in doc.partition("Attributes:\n")[2].splitlines():
    name, colon, text = line.strip().partition(": ")
    if line.startswith("  ") and not line.startswith("   ") and colon:
      found[name] = text
    elif found and line.strip():
      found[[*found][-1]] += " " + line.strip()
  return found


def _list(models: Mapping[str, Model]) -> str:
  return "Models: " + ", ".join(f"{m.name} ({m.title})" for m in models.values())
