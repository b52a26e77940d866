"""The HTTP interface: images, actions, watched passes, runs, health and metrics."""

import asyncio
import math
import pathlib
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

import msgspec
import numpy as np
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from sdiff_jax.serving import answers, guard, openapi, requests, runs, watch
from sdiff_jax.serving.answers import Content
from sdiff_jax.serving.batcher import Answer, Batcher, QueueFull, Stopping, TooLate
from sdiff_jax.serving.lanes import Lane, Rows
from sdiff_jax.serving.metrics import CONTENT_TYPE, Metrics
from sdiff_jax.serving.models import Model
from sdiff_jax.serving.requests import (
  ActionRequest,
  ImageRequest,
  Refused,
  WatchRequest,
)
from sdiff_jax.types import UserError

T = TypeVar("T", bound=msgspec.Struct)

PAGE = pathlib.Path(__file__).with_name("page")
FILES = {  # path of a request -> file of the page and its type
  "/": ("index.html", "text/html"),
  "/docs": ("docs.html", "text/html"),
  "/style.css": ("style.css", "text/css"),
  "/app.js": ("app.js", "text/javascript"),
  "/live.js": ("live.js", "text/javascript"),
  "/runs.js": ("runs.js", "text/javascript"),
  "/docs.js": ("docs.js", "text/javascript"),
}
BODY_SECONDS = 30.0  # until the body of a request must be there
LARGE = 1 << 16  # pixels of an answer that is encoded outside of the event loop


class Service:
  """Everything that requests share.

  Attributes:
    models: by name.
    batcher: before the device.
    metrics: of the service.
    app: the ASGI application.
  """

  def __init__(
    self,
    models: Sequence[Model],
    *,
    folders: Sequence[str] = (),
    token: str = "",
    hosts: Sequence[str] = (),
    max_wait: float = 0.003,
    max_queue: int = 1024,
    max_images: int = 64,
    open_connections: Callable[[], int] = lambda: 0,
  ):
    """Makes the application; `batcher.start` begins to serve.

    Args:
      models: that are served.
      folders: work directories of runs that are shown while they train.
      token: that requests must have; "" for none.
      hosts: names that requests may call this machine; () for any.
      max_wait: seconds that a request waits for others while the device is free.
      max_queue: number of images or robots that may wait.
      max_images: number of images of one request.
      open_connections: () -> number of connections, for the metrics.
    """
    self.models = {model.name: model for model in models}
    self._folders, self._max_images = folders, max_images
    self.metrics = Metrics(lambda: self.batcher.waiting, open_connections)
    self.batcher = Batcher(
      max_wait=max_wait, max_queue=max_queue, on_batch=self.metrics.batch
    )
    self._watcher = watch.Watcher(self.batcher)
    self._files = {
      path: ((PAGE / name).read_bytes(), kind) for path, (name, kind) in FILES.items()
    }
    get = {path: self._file for path in FILES} | {
      "/openapi.json": self._openapi,
      "/healthz": self._health,
      "/metrics": self._metrics,
      "/v1/models": self._models,
      "/v1/runs": self._runs,
      "/v1/runs/{run:int}/grids/{index:int}": self._grid,
    }
    post = {
      "/v1/images": self._images,
      "/v1/actions": self._actions,
      "/v1/watch": self._watch,
    }
    routes = [  # those of the load first, since they are tried one after the other
      Route(path, self._answered(of), methods=[method])
      for method, paths in (("POST", post), ("GET", get))
      for path, of in paths.items()
    ]
    self.app = guard.Guard(
      Starlette(routes=routes), token, hosts, self.metrics.requests
    )

  def _answered(
    self, endpoint: Callable[[Request], Awaitable[Response]]
  ) -> Callable[[Request], Awaitable[Response]]:
    """Returns an endpoint whose errors are answers."""

    async def answered(request: Request) -> Response:
      try:
        return await endpoint(request)
      except Refused as error:
        return _error(str(error), error.kind, error.status)
      except QueueFull as error:
        headers = {"Retry-After": str(error.retry_after)}
        return _error("the queue is full", "busy", 429, headers)
      except TooLate:
        message = "deadline_ms: the answer cannot be there in time"
        return _error(message, "deadline", 503)
      except Stopping:
        headers = {"Connection": "close", "Retry-After": "5"}
        return _error("the service stops", "stopping", 503, headers)
      except ClientDisconnect:
        return Response(status_code=499)  # nobody reads it
      except UserError as error:
        return _error(str(error), "files", 500)
      except Exception as error:  # of the device; the service goes on
        print(f"{request.url.path}: {type(error).__name__}: {error}", file=sys.stderr)
        return _error(
          "the device failed; the service's log has the reason", "device", 500
        )

    return answered

  async def _file(self, request: Request) -> Response:
    content, kind = self._files[request.url.path]
    headers = {"Cache-Control": "no-cache", "Content-Security-Policy": guard.POLICY}
    return Response(content, media_type=kind, headers=headers)

  async def _openapi(self, request: Request) -> Response:
    return _json(openapi.document(self.models))

  async def _health(self, request: Request) -> Response:
    if self.batcher.is_stopping:
      return _json({"status": "stopping"}, 503)
    return _json({"status": "ok", "waiting": self.batcher.waiting})

  async def _metrics(self, request: Request) -> Response:
    return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

  async def _models(self, request: Request) -> Response:
    return _json({"models": [openapi.describe(m) for m in self.models.values()]})

  async def _runs(self, request: Request) -> Response:
    return _json({"runs": await asyncio.to_thread(runs.overview, self._folders)})

  async def _grid(self, request: Request) -> Response:
    run, index = request.path_params["run"], request.path_params["index"]
    content = await asyncio.to_thread(runs.grid, self._folders, run, index)
    if content is None:
      raise Refused("there is no such grid", 404, "unknown")
    return Response(content, media_type="image/png")

  async def _images(self, request: Request) -> Response:
    begin = time.perf_counter()
    asked = await _read(request, _IMAGES)
    model = requests.find(self.models, asked.model, "images")
    if asked.seeds and len(asked.seeds) > self._max_images:
      raise Refused(f"seeds: must be at most {self._max_images}")
    lane, rows = requests.images(model, asked)
    answer = await self._submit(lane, rows, begin, asked.deadline_ms)
    answers.check_finite(answer.rows, "images")
    seeds = rows["seeds"]
    labels = model.labels(rows)

    def content() -> Content:
      return answers.of_images(answer, seeds, labels, asked.format)

    large = len(seeds) * math.prod(model.shape) > LARGE
    made = await asyncio.to_thread(content) if large else content()
    self._count(lane, answer, begin)
    return Response(made.body, media_type=made.media_type, headers=made.headers)

  async def _actions(self, request: Request) -> Response:
    begin = time.perf_counter()
    asked = await _read(request, _ACTIONS)
    model = requests.find(self.models, asked.model, "actions")
    lanes, rows = requests.actions(model, asked)
    deadline = asked.deadline_ms
    if deadline is None:
      lane = lanes[0]
    else:  # the most passes that fit, or those that come closest
      left = deadline / 1e3
      fits = [of for of in lanes if self.batcher.seconds_until_answer(of) <= left]
      lane = fits[0] if fits else lanes[-1]
    answer = await self._submit(lane, rows, begin, deadline)
    answers.check_finite(answer.rows, "actions")
    self._count(lane, answer, begin)
    return Response(answers.of_actions(answer).body, media_type=answers.JSON)

  async def _submit(
    self, lane: Lane, rows: Rows, begin: float, deadline_ms: float | None
  ) -> Answer:
    deadline = math.inf if deadline_ms is None else begin + deadline_ms / 1e3
    return await self.batcher.submit(lane, rows, deadline)

  def _count(self, lane: Lane, answer: Answer, begin: float) -> None:
    self.metrics.latency.labels(lane.name).observe(time.perf_counter() - begin)
    passes = self.metrics.passes.labels(lane.name)
    for number in answer.rows["passes"].tolist():
      passes.observe(number)

  async def _watch(self, request: Request) -> Response:
    asked = await _read(request, _WATCH)
    known = {k: m for k, m in self.models.items() if m.live}
    if not known:
      raise Refused("model: no model has a sampler to be watched", 404, "unknown")
    model = requests.find(known, asked.model, "images")
    key = model.live.key
    rows = requests.conditioned(model, asked, np.array([asked.seed], np.int32), key)
    events = self._watcher.events(model, rows)
    headers = {"Cache-Control": "no-store"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


_IMAGES = msgspec.json.Decoder(ImageRequest)
_ACTIONS = msgspec.json.Decoder(ActionRequest)
_WATCH = msgspec.json.Decoder(WatchRequest)


async def _read(request: Request, decoder: msgspec.json.Decoder[T]) -> T:
  """Returns the body of a request, read within bounds of size and time.

  Raises:
    Refused: it is too large, comes too slowly, is no JSON, or has another form.
  """
  if request.headers.get("content-type", "").partition(";")[0].strip() != answers.JSON:
    raise Refused(f"Content-Type: must be {answers.JSON}", 415, "type")
  body = b""
  try:
    async with asyncio.timeout(BODY_SECONDS):
      async for part in request.stream():
        body += part
        if len(body) > requests.MAX_BODY:
          message = f"the body has more than {requests.MAX_BODY:,} bytes"
          raise Refused(message, 413, "size")
  except TimeoutError:
    raise Refused("the body did not come in time", 408, "time") from None
  try:
    return decoder.decode(body)
  except msgspec.ValidationError as error:
    raise Refused(_with_field(str(error))) from None
  except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
    raise Refused(f"the body is no JSON: {error}", 400, "json") from None


def _with_field(message: str) -> str:
  """Returns a message of msgspec with the name of the field first."""
  text, _, path = message.partition(" - at `$")
  field = path.strip("`.") or "the body"
  return f"{field}: {text[:1].lower()}{text[1:]}"


def _json(value: Mapping[str, object], status: int = 200) -> Response:
  return Response(answers.encode(value), status, media_type=answers.JSON)


def _error(
  message: str, kind: str, status: int, headers: Mapping[str, str] | None = None
) -> Response:
  headers = {**(headers or {})}
  if status in (408, 413):  # the rest of the body is not read
    headers["Connection"] = "close"
  body = answers.error(message, kind)
  return Response(body, status, media_type=answers.JSON, headers=headers)
