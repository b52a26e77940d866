"""The page in a real browser: its images are those of `samplers.sample`, its race ends."""

import importlib.util
import shutil
import threading

import jax
import numpy as np
import pytest
from test_serve import make_run

from sdiff_jax import samplers
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import sampling, serving
from sdiff_jax.experiment import workdir as workdir_lib

CHROMIUM = shutil.which("chromium") or ""
MISSING = not CHROMIUM or importlib.util.find_spec("playwright") is None

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(MISSING, reason="needs Debian's chromium and the extra `browser`"),
]
# The red channel of an image, as the browser decodes it.
PIXELS = """image => {
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
  return Array.from(data).filter((_, k) => k % 4 === 0);
}"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
  return make_run(tmp_path_factory.mktemp("page") / "run")


@pytest.fixture(scope="module")
def address(run):
  from sdiff_jax.serving import server
  from sdiff_jax.serving.api import Service

  patch = pytest.MonkeyPatch()
  one = sharding.make_mesh(devices=jax.devices()[:1])
  patch.setattr(experiments, "mesh", lambda config: one)
  choice = serving.Choice(live="paraddim/4", batch_sizes=(1,))
  model = serving.of_run(workdir_lib.read(run), run, "run", choice)
  patch.undo()
  opened, ended = server.listen("127.0.0.1", 0), threading.Event()
  url = f"http://127.0.0.1:{opened.getsockname()[1]}/"
  service = Service([model], folders=[run], token="a-token-of-this-test")
  args = (service, opened, server.Connections(), ended.is_set)
  thread = threading.Thread(target=server.run, args=args)
  thread.start()
  yield url
  ended.set()
  thread.join(30)


@pytest.fixture(params=["light", "dark"])
def page(request, address):
  from playwright.sync_api import sync_playwright

  with sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=CHROMIUM, args=["--no-sandbox"]
    )
    opened = browser.new_page(color_scheme=request.param, reduced_motion="reduce")
    opened.faults = []
    opened.on("pageerror", lambda error: opened.faults.append(str(error)))
    opened.goto(f"{address}#token=a-token-of-this-test")
    opened.wait_for_selector("body[data-ready]")
    yield opened
    assert not opened.faults
    browser.close()


def wanted(run: str, seeds: range, label: int, scale: float, steps: int) -> np.ndarray:
  """Returns the images of `samplers.sample`, int [n, 64]."""
  experiment, params = workdir_lib.trained(workdir_lib.read(run), run)
  sampler = samplers.build("ddim", sigma_d=experiment.sigma_d, steps=steps)
  denoiser = sampling.denoiser(experiment, params, scale)
  cond = {"label": np.full(len(seeds), label, np.int32)}
  shape = experiment.dataset.shape
  out = samplers.sample(sampler, denoiser, np.array(seeds, np.int32), shape, cond)
  images = np.asarray(sampling.decode(experiment, None, out.x))
  return images.reshape(len(seeds), -1).astype(int)


def test_images_and_race(page, run):
  assert "token" not in page.url
  page.select_option("#label", "4")
  page.locator("#seed").fill("11")
  page.locator("#guidance").fill("2.5")
  page.click("#make")
  page.wait_for_selector("img[alt='Seed 16, class 4, ddim in 2 steps']")
  images = page.locator(".pictures img")
  shown = np.array([images.nth(k).evaluate(PIXELS) for k in range(6)])
  assert abs(shown - wanted(run, range(11, 17), 4, 2.5, 2)).max() <= 1
  assert page.locator(".column dd").first.text_content() == "2"
  page.click("#race")
  page.locator("#verdict", has_text="in place of").wait_for()
  last = page.locator("#sequential img").evaluate(PIXELS)
  assert abs(np.array(last) - wanted(run, range(11, 12), 4, 2.5, 4)).max() <= 1
  assert page.locator("#sequential").get_attribute("data-finished") == "yes"
  rows = page.locator("#stairs g").count()
  assert 1 <= rows <= 4
  assert page.locator("#film li").count() == rows


def test_it_is_used_by_the_keyboard_alone(page):
  page.focus("#tab-images")
  page.keyboard.press("ArrowRight")
  page.wait_for_selector("article h3")
  assert page.evaluate("document.activeElement.id") == "tab-runs"
  assert page.locator("#images").is_hidden()
  page.keyboard.press("ArrowLeft")
  assert page.locator("#images").is_visible()
  page.focus("#seed")
  page.keyboard.press("ArrowRight")
  assert page.locator("output[for=seed]").text_content() == "8"


def test_every_control_has_a_name_and_nothing_overflows(page, address):
  page.set_viewport_size({"width": 360, "height": 800})
  for path in ("", "docs"):
    page.goto(address + path)
    page.wait_for_selector("body[data-ready]")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    unnamed = page.evaluate(
      "[...document.querySelectorAll('button, select, input, img')].filter(e => "
      "e.checkVisibility() && !(e.labels?.length || e.ariaLabel || e.textContent.trim() "
      "|| e.hasAttribute('alt'))).map(e => e.outerHTML)"
    )
    assert unnamed == []


def test_without_the_token_it_asks_for_it(page, address):
  page.evaluate("sessionStorage.clear()")
  page.goto(address)
  page.wait_for_selector("#token-value")
  page.fill("#token-value", "a-token-of-this-test")
  page.click("#token button")
  page.wait_for_selector("body[data-ready]")
  assert page.locator("#token").is_hidden()
