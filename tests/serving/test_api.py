"""The HTTP interface, over models of NumPy: what is answered, and what is refused."""

import asyncio
import base64
import io
import json
import re
import threading

import httpx
import numpy as np
import pytest
import stand_ins
from PIL import Image

from sdiff_jax.serving.api import Service

JSON = {"Content-Type": "application/json"}


def asked(scenario, models=None, **options):
  """Runs a coroutine of a client of a service, in one event loop."""

  async def main():
    given = [stand_ins.images(), stand_ins.policy()] if models is None else models
    service = Service(given, **{"max_wait": 0.001} | options)
    service.batcher.start()
    transport = httpx.ASGITransport(app=service.app)
    try:
      async with httpx.AsyncClient(
        transport=transport, base_url="http://127.0.0.1:8000", timeout=30
      ) as client:
        return await scenario(client)
    finally:
      await service.batcher.drain()

  return asyncio.run(main())


def post(path, models=None, **body):
  return asked(lambda client: client.post(path, json=body), models)


def opened(content: bytes) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(content)))


def test_a_png():
  answer = post("/v1/images", seed=7)
  assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
  assert (opened(answer.content) == stand_ins.pixels(7, 7)[..., 0]).all()
  assert answer.headers["x-evaluations"] == "2"
  assert re.fullmatch(
    r"queue;dur=[\d.]+, batch;dur=[\d.]+", answer.headers["server-timing"]
  )


def test_many_seeds_as_npz():
  seeds = [5, 3, 2**31 - 1, 3]
  answer = post(
    "/v1/images", seeds=seeds, label=4, format="npz", steps=8, sampler="ddim"
  )
  with np.load(io.BytesIO(answer.content)) as arrays:
    wanted = np.stack([stand_ins.pixels(seed, 4) for seed in seeds])
    assert (arrays["arr_0"] == wanted).all()
    assert arrays["arr_1"].tolist() == [4] * 4


def test_json_with_guidance():
  body = post("/v1/images", seeds=[11], format="json", guidance=2.5).json()
  (image,) = body["images"]
  assert (image["seed"], image["label"], image["evaluations"]) == (11, 1, 2)
  assert (
    opened(base64.b64decode(image["png"])) == stand_ins.pixels(11, 1, 2.5)[..., 0]
  ).all()
  assert body["batch"] == 1


@pytest.mark.parametrize(
  ("body", "message"),
  [
    ({}, "seed, seeds: give one of them"),
    ({"seed": 1, "seeds": [1]}, "seed, seeds: give one of them"),
    ({"seed": -1}, "seed: expected `int` >= 0"),
    ({"seed": 2**31}, "seed: expected `int` <= 2147483647"),
    ({"seed": 1.5}, "seed: expected `int | null`, got `float`"),
    ({"seed": "1"}, "seed: expected `int | null`, got `str`"),
    ({"seed": True}, "seed: expected `int | null`, got `bool`"),
    ({"seeds": []}, "seeds: expected `array` of length >= 1"),
    ({"seeds": [1] * 100}, "seeds: must be at most 64"),
    ({"seeds": [1] * 10_000}, "seeds: expected `array` of length <= 256"),
    ({"seeds": [1, 2]}, 'format: "png" is one image'),
    ({"seed": 1, "format": "exe"}, "format: invalid enum value 'exe'"),
    ({"seed": 1, "label": 10}, "label: 10 must be 0 to 9"),
    ({"seed": 1, "prompt": "a cat"}, "prompt: digits takes none"),
    ({"seed": 1, "prompt": "a" * 1001}, "prompt: expected `str` of length <= 1000"),
    ({"seed": 1, "guidance": 1e300}, "guidance: expected `float` <= 1000"),
    ({"seed": 1, "guidance": -0.1}, "guidance: expected `float` >= 0"),
    (
      {"seed": 1, "steps": 7},
      "sampler, steps: heun/7 is not compiled; there are heun/16",
    ),
    ({"seed": 1, "sampler": "../x"}, "sampler, steps: ../x/0 is not compiled"),
    ({"seed": 1, "path": "/etc/passwd"}, "object contains unknown field `path`"),
    ({"seed": 1, "deadline_ms": 0}, "deadline_ms: expected `float` > 0"),
  ],
)
def test_what_is_refused(body, message):
  answer = asked(lambda client: client.post("/v1/images", json=body))
  assert answer.status_code == 422
  text = answer.json()["error"]["message"]
  assert message.lower() in text.lower()
  assert len(text) < 500


@pytest.mark.parametrize(
  "content",
  [
    b'{"seed": 1%s}' % (b"0" * 400),
    b"",
    b"{",
    b"[]",
    b"null",
    b'"x"',
    b"\xff",
    b"{" * 100000,
    b'{"seed": NaN}',
    b'{"seed": Infinity}',
    b'{"seed": 1e999}',
    b'{"prompt": "\\ud800", "seed": 1}',
  ],
)
def test_what_is_no_request(content):
  answer = asked(lambda c: c.post("/v1/images", content=content, headers=JSON))
  assert answer.status_code in (400, 422)
  assert answer.json()["error"]["kind"] in ("json", "invalid")


def test_unknown_models_and_paths():
  assert post("/v1/images", seed=1, model="nothing").status_code == 404
  assert post("/v1/images", seed=1, model="robot").status_code == 404
  assert post("/v1/nothing").status_code == 404
  assert asked(lambda c: c.get("/v1/images")).status_code == 405
  assert asked(lambda c: c.get("/v1/runs/0/grids/0")).status_code == 404


def test_bodies_that_are_too_large_are_not_read():
  async def many():
    for _ in range(1000):
      yield b" " * 1_000_000
      many.sent += 1

  many.sent = 0
  answer = asked(lambda c: c.post("/v1/images", content=many(), headers=JSON))
  assert (answer.status_code, answer.headers["connection"]) == (413, "close")
  assert many.sent < 3
  told = JSON | {"Content-Length": str(100_000_000)}
  answer = asked(lambda c: c.post("/v1/images", content=b"", headers=told))
  assert answer.status_code == 413


def test_a_form_of_another_page_is_refused():
  """A page elsewhere cannot send JSON without asking, nor call us by another name."""
  text = {"Content-Type": "text/plain"}
  answer = asked(lambda c: c.post("/v1/images", content=b'{"seed":1}', headers=text))
  assert answer.status_code == 415
  hosts = ("127.0.0.1", "localhost", "[::1]")
  for name, status in (
    ("localhost:8000", 200),
    ("[::1]:8000", 200),
    ("127.0.0.1", 200),
    ("evil.example", 421),
    ("evil.example:8000", 421),
  ):
    answer = asked(
      lambda c, n=name: c.get("/healthz", headers={"Host": n}), hosts=hosts
    )
    assert answer.status_code == status, name


def test_the_token():
  async def scenario(client):
    given = {"Authorization": "Bearer correct-horse-battery"}
    wrong = {"Authorization": "Bearer wrong"}
    codes = [
      (await client.get(path, headers=headers)).status_code
      for path in ("/v1/models", "/metrics", "/v1/runs")
      for headers in ({}, wrong, given)
    ]
    codes.append((await client.get("/healthz")).status_code)
    codes.append((await client.get("/")).status_code)
    return codes

  codes = asked(scenario, token="correct-horse-battery")
  assert codes == [401, 401, 200] * 3 + [200, 200]


def test_weights_that_are_not_finite_are_a_clear_error():
  """The image of seed 666 has NaN; the others of its batch are answered."""

  async def scenario(client):
    return await asyncio.gather(
      *(client.post("/v1/images", json={"seed": seed}) for seed in (1, 666, 2))
    )

  first, bad, last = asked(scenario, max_wait=0.2)
  assert (first.status_code, last.status_code) == (200, 200)
  assert first.headers["x-batch"] == "3"
  assert bad.status_code == 500
  assert bad.json()["error"]["kind"] == "not_finite"
  robot = {"states": [[0, 0, 0], [1, 2, 3]], "seed": 666}
  assert post("/v1/actions", **robot).status_code == 500


def test_a_device_that_fails_is_an_error_of_the_server():
  def fail(rows):
    raise RuntimeError("out of memory")

  answer = post("/v1/images", [stand_ins.images(function=fail)], seed=1)
  assert answer.status_code == 500
  assert answer.json()["error"]["kind"] == "device"
  assert "memory" not in answer.text  # what went wrong is for the log


def test_a_full_queue():
  gate = threading.Event()

  def wait(rows):
    assert gate.wait(20)
    return stand_ins.draw(rows)

  async def scenario(client):
    tasks = [
      asyncio.create_task(client.post("/v1/images", json={"seed": k}))
      for k in range(30)
    ]
    refused = []
    while not refused:
      await asyncio.sleep(0.01)
      refused = [t.result() for t in tasks if t.done()]
    gate.set()
    return await asyncio.gather(*tasks)

  answers = asked(scenario, [stand_ins.images(function=wait)], max_queue=8)
  codes = [answer.status_code for answer in answers]
  assert {*codes} == {200, 429}
  assert all(
    int(a.headers["retry-after"]) >= 1 for a in answers if a.status_code == 429
  )


def test_actions():
  body = {"states": [[0, 0, 0], [1, 2, 3]], "seed": 1, "max_passes": 5}
  answer = post("/v1/actions", **body).json()
  assert (answer["actions"], answer["passes"]) == ([[5.0, 6.0, 7.0]], 4)
  assert post("/v1/actions", **body | {"max_passes": 0}).json()["passes"] == 32


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"states": [[0, 0, 0]]}, "states: must be 2 states of 3 numbers"),
    ({"states": [[0, 0], [0, 0]]}, "states: must be 2 states of 3 numbers"),
    ({"states": [[0, 0, 0], [0, 0, 1e300]]}, "expected `float` <= 1000000"),
    ({"states": [[0, 0, 0], [0, 0, None]]}, "expected `float`, got `null`"),
    ({"max_passes": 3}, "max_passes: 3 must be at least 4"),
  ],
)
def test_actions_that_are_refused(changes, message):
  answer = post("/v1/actions", **{"states": [[0, 0, 0], [1, 2, 3]]} | changes)
  assert answer.status_code == 422
  assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize(
  ("deadline", "passes"), [(60_000, 32), (250, 16), (110, 4), (5, None)]
)
def test_a_deadline_bounds_the_passes(deadline, passes):
  """Passes of 10 ms: as many of them as fit, or a refusal."""
  body = {"states": [[0, 0, 0], [1, 2, 3]], "deadline_ms": deadline}
  answer = post("/v1/actions", **body)
  if passes is None:
    assert answer.status_code == 503
    assert answer.json()["error"]["kind"] == "deadline"
  elif answer.status_code == 200:  # a busy machine may be late, and must then refuse
    assert answer.json()["passes"] <= passes
  if deadline == 60_000:
    assert answer.json()["passes"] == 32


def events(text: str) -> list[tuple[str, dict]]:
  found = re.findall(r"event: (\w+)\ndata: (.*)\n\n", text)
  return [(name, json.loads(data)) for name, data in found]


def test_the_race_pass_by_pass():
  answer = post("/v1/watch", seed=3)
  assert answer.headers["content-type"].startswith("text/event-stream")
  found = events(answer.text)
  assert found[0][1]["window"] == stand_ins.WINDOW
  assert found[-1][0] == "end"
  for mode, stride, window in (("parallel", 2, 4), ("sequential", 1, 1)):
    passes = [d for name, d in found if name == "pass" and d["mode"] == mode]
    assert [d["begin"] for d in passes] == [*range(0, 8, stride)]
    assert [d["end"] for d in passes] == [min(d["begin"] + window, 8) for d in passes]
    assert [d["pass"] for d in passes] == [*range(1, 8 // stride + 1)]
    assert sorted(d["ms"] for d in passes) == [d["ms"] for d in passes]
    for d in passes:
      assert (opened(base64.b64decode(d["png"])) == 10 * d["begin"]).all()
    (done,) = (d for name, d in found if name == "done" and d["mode"] == mode)
    assert done["passes"] == len(passes)
    image = opened(base64.b64decode(done["png"]))
    assert (image == stand_ins.pixels(3, 3)[..., 0]).all()


def test_metrics_and_health():
  async def scenario(client):
    await client.post("/v1/images", json={"seeds": [1, 2, 3], "format": "npz"})
    await client.post("/v1/images", json={"seed": -1})
    await client.get("/nothing/at/all")
    return (await client.get("/metrics")).text, (await client.get("/healthz")).json()

  text, health = asked(scenario)
  assert health == {"status": "ok", "waiting": 0}
  lines = dict(re.findall(r"^(sdiff_.+) (\S+)$", text, re.MULTILINE))
  assert lines['sdiff_requests_total{path="/v1/images",status="200"}'] == "1.0"
  assert lines['sdiff_requests_total{path="/v1/images",status="422"}'] == "1.0"
  assert lines['sdiff_requests_total{path="other",status="404"}'] == "1.0"
  assert lines['sdiff_batch_rows_sum{lane="digits heun"}'] == "3.0"
  assert lines['sdiff_padding_rows_total{lane="digits heun"}'] == "1.0"
  assert lines['sdiff_passes_count{lane="digits heun"}'] == "3.0"
  assert lines["sdiff_queue_rows"] == "0.0"


def test_the_description_has_every_field_and_every_path():
  async def scenario(client):
    return (await client.get("/openapi.json")).json(), (
      await client.get("/v1/models")
    ).json()

  document, models = asked(scenario)
  assert {"/v1/images", "/v1/actions", "/v1/watch", "/metrics"} <= document[
    "paths"
  ].keys()
  for schema in document["components"]["schemas"].values():
    assert all(field["description"] for field in schema["properties"].values())
  first, second = models["models"]
  assert [s["steps"] for s in first["samplers"]] == [16, 8, 8]
  assert second["samplers"][0]["max_passes"] == [4, 16]


def test_the_page_loads_nothing_from_elsewhere():
  async def scenario(client):
    paths = ["/", "/docs", "/style.css", "/app.js", "/live.js", "/runs.js", "/docs.js"]
    return {path: await client.get(path) for path in paths}

  for path, answer in asked(scenario).items():
    assert answer.status_code == 200, path
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    outside = re.findall(r"(?:src|href|url|import)\W+(?:https?:)?//\S+", answer.text)
    assert not outside, path
