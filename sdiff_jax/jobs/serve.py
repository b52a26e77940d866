"""Job `serve`: answers requests for images and actions over HTTP, and shows a page."""

import dataclasses
import importlib.util
import ipaddress
import os
import secrets
from collections.abc import Iterator
from typing import Annotated

import jax
import ml_collections

from sdiff_jax import config as configs
from sdiff_jax import registry
from sdiff_jax.distributed import signals
from sdiff_jax.experiment import serving as models_lib
from sdiff_jax.experiment import stored_config
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.fields import Count, Length, Range
from sdiff_jax.io import storage
from sdiff_jax.io.progress import Progress
from sdiff_jax.serving.models import Model
from sdiff_jax.training import checkpoints as checkpoints_lib
from sdiff_jax.types import UserError

TOKEN = "SDIFF_JAX_TOKEN"  # variable of the environment
PACKAGES = ("starlette", "uvicorn", "httptools", "prometheus_client")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve:
  """The service, and what is compiled for it.

  Attributes:
    host: address of this machine to listen at; other machines reach all but the
      default, and then need the token.
    port: number; 0 for any that is free.
    samplers: "name/steps" that are compiled for all batch sizes; () for the first one of
      each run, with those that it was evaluated with for single images.
    live: parallel sampler whose passes the page shows; "" for none.
    live_window: its window, where the run's config has none.
    batch_sizes: images of a batch on each device.
    max_passes: of policies with a parallel sampler: bounds of the passes, which requests
      with a deadline choose from.
    max_wait_ms: how long a request waits for others while the device is free.
    max_queue: number of images that may wait; further requests are refused.
    max_images: number of images of one request.
    max_connections: number of connections; further ones are closed.
  """

  host: str = "127.0.0.1"
  port: Annotated[int, Range(0, 65_535)] = 8000
  samplers: Annotated[tuple[str, ...], Length(0, 100)] = ()
  live: str = "paraddim/64"
  live_window: Annotated[int, Range(1, 100_000)] = 16
  batch_sizes: Annotated[tuple[int, ...], Range(1, 65_536), Length(1, 20)] = (
    models_lib.BATCH_SIZES
  )
  max_passes: Annotated[tuple[int, ...], Range(1, 100_000), Length(0, 20)] = (4, 16)
  max_wait_ms: Annotated[float, Range(0, 1000)] = 3.0
  max_queue: Annotated[int, Range(1, 1_000_000)] = 1024
  max_images: Annotated[int, Range(1, 256)] = 64
  max_connections: Count = 1024


@registry.register(
  "jobs",
  "serve",
  sections={"serve": Serve},
  runtime=("serve",),
  needs_config=False,
  shares_workdir=True,
  several_workdirs=True,
  configs_of=("train", "generate"),
)
def run(config: ml_collections.ConfigDict | None, workdir: str) -> str:
  """Serves runs, or a model of the job `generate`, until a signal stops it.

  Args:
    config: gives serve and mesh; of the job `generate` also the model.
    workdir: a run, a folder of runs, or several of them with commas between.

  Raises:
    UserError: a package is missing, there is nothing to serve, or the address is taken.
    Stopped: a signal stopped the service, after the last answer.
  """
  missing = [p for p in PACKAGES if importlib.util.find_spec(p) is None]
  if missing:
    raise UserError(
      f"--job=serve needs {', '.join(missing)}: pip install 'sdiff_jax[serve]'"
    )
  if jax.process_count() > 1:
    raise UserError("--job=serve runs in one process; start one on each machine")
  from sdiff_jax.serving import server  # after the check of the packages
  from sdiff_jax.serving.api import Service

  # Compiled programs are kept however small, so that the service starts again quickly.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  section = configs.base().serve if config is None else config.serve
  opened = _listen(server, section)
  with signals.stopping() as stop:
    models, folders = _models(config, workdir, section)
    connections = server.Connections(section.max_connections)
    token = _token(section.host)
    service = Service(
      models,
      folders=folders,
      token=token,
      hosts=() if token else ("127.0.0.1", "localhost", "[::1]"),
      max_wait=section.max_wait_ms / 1e3,
      max_queue=section.max_queue,
      max_images=section.max_images,
      open_connections=lambda: connections.open,
    )
    address, port = opened.getsockname()[:2]
    host = f"[{address}]" if ":" in address else address
    end = f"#token={token}" if token else ""
    names = ", ".join(model.name for model in models)
    print(f"serving {names}: http://{host}:{port}/{end}", flush=True)
    server.run(service, opened, connections, stop)
  raise signals.Stopped("stopped after the last answer; repeat the command to go on")


def _listen(server: object, section: ml_collections.ConfigDict) -> object:
  """Returns the socket of the service."""
  try:
    return server.listen(section.host, section.port)
  except (OSError, UnicodeError) as error:
    reason = getattr(error, "strerror", None) or error
    raise UserError(
      f"config.serve.host={section.host}, port={section.port}: {reason}; use another one"
    ) from None


def _token(host: str) -> str:
  """Returns the token that requests must have, "" on this machine alone."""
  given = os.environ.get(TOKEN, "")
  if given and (len(given) < 16 or not given.isascii() or not given.isprintable()):
    raise UserError(f"{TOKEN}: must be at least 16 printable characters of ASCII")
  return given or ("" if _is_local(host) else secrets.token_urlsafe(24))


def _is_local(host: str) -> bool:
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"


def _models(
  config: ml_collections.ConfigDict | None,
  workdir: str,
  section: ml_collections.ConfigDict,
) -> tuple[list[Model], list[str]]:
  """Returns the models, and the work directories that are shown while they train."""
  choice = models_lib.Choice(
    samplers=section.samplers,
    live=section.live,
    live_window=section.live_window,
    batch_sizes=section.batch_sizes,
    max_passes=section.max_passes,
  )
  if config is not None and config.job == "generate":
    name = os.path.basename(config.generate.folder.rstrip("/")) or "model"
    return [models_lib.of_diffusers(config, name, choice)], []
  folders = [*_folders(workdir)]
  trained = [f for f in folders if checkpoints_lib.newest(f) is not None]
  if not trained:
    raise UserError(f"--workdir={workdir}: no trained run; make one with --job=train")
  models: list[Model] = []
  with Progress(len(trained), label="compile", unit="run") as progress:
    for folder in trained:
      stored = workdir_lib.read(folder)
      configs.load_plugins(stored_config.plugins(folder))
      if config is not None:
        stored.mesh, stored.vae = config.mesh, config.vae
      name = _name(folder, [model.name for model in models])
      models.append(models_lib.of_run(stored, folder, name, choice))
      progress.add(1)
  return models, folders


def _folders(workdir: str) -> Iterator[str]:
  """Yields the work directories of runs that the flag names, the oldest first."""
  for path in workdir.split(",") if not storage.isdir(workdir) else [workdir]:
    if storage.lexists(os.path.join(path, stored_config.CONFIG)):
      yield path
      continue
    if not storage.isdir(path):
      raise UserError(f"--workdir={path}: no such run or folder of runs")
    runs = (os.path.join(path, name) for name in storage.listdir(path))
    runs = [r for r in runs if storage.lexists(os.path.join(r, stored_config.CONFIG))]
    yield from sorted(runs, key=storage.created)


def _name(folder: str, taken: list[str]) -> str:
  """Returns the name of a folder, with a number if another run has it."""
  name = os.path.basename(folder.rstrip("/"))[:90]
  names = [name, *(f"{name}-{k}" for k in range(2, len(taken) + 3))]
  return next(n for n in names if n not in taken)
