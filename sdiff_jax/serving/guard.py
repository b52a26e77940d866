"""Who may ask: the token, the names of this machine, and a bound on bodies."""

import hmac
from collections.abc import Sequence

import prometheus_client
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdiff_jax.serving import answers, requests

# What is open to all: the page, which asks for the token, and the health.
OPEN = ("/", "/docs", "/healthz", "/openapi.json")
# The page loads nothing from elsewhere, and no other page may frame it.
POLICY = (
  "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; "
  "base-uri 'none'; form-action 'self'"
)


class Guard:
  """An ASGI application before another one, which refuses and counts requests."""

  def __init__(
    self,
    app: ASGIApp,
    token: str,
    hosts: Sequence[str],
    counter: prometheus_client.Counter,
  ):
    """Stores the application.

    Args:
      app: that answers.
      token: that requests must have; "" for none.
      hosts: names that requests may call this machine; () for any. Other names are
        those of pages elsewhere that were made to point here.
      counter: of requests, by path and status.
    """
    self._app, self._hosts, self._counter = app, {*hosts}, counter
    self._token = f"Bearer {token}".encode() if token else b""

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a request.

    Args:
      scope: of the request.
      receive: gives its body.
      send: takes the answer.
    """
    if scope["type"] != "http":
      return
    path = scope["path"]

    async def counted(message: Message) -> None:
      if message["type"] == "http.response.start":
        known = path if path in COUNTED else "other"
        self._counter.labels(known, str(message["status"])).inc()
        message["headers"].append((b"x-content-type-options", b"nosniff"))
      await send(message)

    if refusal := self._refusal(path, dict(scope["headers"])):
      await _refuse(counted, *refusal)
      return
    await self._app(scope, receive, counted)

  def _refusal(
    self, path: str, headers: dict[bytes, bytes]
  ) -> tuple[int, str, str] | None:
    """Returns status, kind and message for a request that is not answered."""
    name = headers.get(b"host", b"").decode("latin-1").rpartition(":")
    host = name[0] if name[2].isdigit() and name[0] else "".join(name)
    if self._hosts and host not in self._hosts:
      return 421, "host", "Host: this service answers to the name of this machine alone"
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or len(length) > 12 or int(length) > requests.MAX_BODY:
      return 413, "size", f"the body has more than {requests.MAX_BODY:,} bytes"
    is_open = path in OPEN or path.endswith((".js", ".css"))
    if self._token and not is_open:
      given = headers.get(b"authorization", b"")
      if not hmac.compare_digest(given, self._token):
        return 401, "token", "Authorization: must be 'Bearer' and the service's token"
    return None


COUNTED = {"/", "/docs", "/openapi.json", "/healthz", "/metrics", "/v1/models"}
COUNTED |= {"/v1/images", "/v1/actions", "/v1/watch", "/v1/runs"}


async def _refuse(send: Send, status: int, kind: str, message: str) -> None:
  body = answers.error(message, kind)
  headers = [
    (b"content-type", answers.JSON.encode()),
    (b"content-length", str(len(body)).encode()),
    (b"connection", b"close"),
  ]
  if status == 401:
    headers.append((b"www-authenticate", b"Bearer"))
  await send({"type": "http.response.start", "status": status, "headers": headers})
  await send({"type": "http.response.body", "body": body})
