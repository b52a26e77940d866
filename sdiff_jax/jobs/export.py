"""Job `export`: writes a trained run in a format that others use."""

import dataclasses
import os

import jax
import ml_collections

from sdiff_jax import registry
from sdiff_jax.distributed import sharding
from sdiff_jax.experiment import build as experiments
from sdiff_jax.experiment import exports, model_card, sampling
from sdiff_jax.experiment import workdir as workdir_lib
from sdiff_jax.experiment.exports import Run
from sdiff_jax.io import file_io, storage
from sdiff_jax.pretrained.diffusers import hub
from sdiff_jax.types import UserError

CARD = "README.md"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
  """What is written, and where.

  Attributes:
    format: "stablehlo" (the sampler as a program), "diffusers" (a folder of that
      library), "lora" (adapters), "safetensors" or "edm2" (weights).
    folder: of the files; "" for export/FORMAT in the work directory.
    license: of the weights, for the card, as the Hugging Face Hub names it; "" for that
      of the published folder that the run was distilled from, if there is one.
    push: hf://ORG/NAME, to which the folder is uploaded; "" for none.
  """

  format: str = "stablehlo"
  folder: str = ""
  license: str = ""
  push: str = ""

  def __post_init__(self) -> None:
    if self.push:
      try:
        hub.check_name(self.push)
      except ValueError as error:
        raise ValueError(f"push={error}") from None


@registry.register(
  "jobs",
  "export",
  sections={"export": Export},
  runtime=("export",),
  shares_workdir=True,
)
def run(config: ml_collections.ConfigDict, workdir: str) -> str:
  """Writes the run's files and a card, README.md, into one folder.

  Raises:
    UserError: there is no such format, or the run cannot be written in it.
  """
  section = config.export
  write = registry.lookup(exports.KIND, section.format).build
  if jax.process_count() > 1:
    raise UserError("--job=export runs in one process")
  loaded = _load(config, workdir)
  folder = section.folder or os.path.join(workdir, "export", section.format)
  sampler = sampling.build_sampler(config)
  written = write(loaded, folder)
  name = os.path.basename(storage.absolute(workdir))
  card = model_card.card(
    loaded,
    written,
    name=name,
    sampler=sampler,
    workdir=workdir,
    license=section.license,
  )
  file_io.write_text(os.path.join(folder, CARD), card)
  pushed = f", {hub.push(folder, section.push)}" if section.push else ""
  return f"exported {written.about}: {folder}{pushed}"


def _load(config: ml_collections.ConfigDict, workdir: str) -> Run:
  """Returns the run, on one device and with plain attention.

  Raises:
    UserError: there is no trained run, or it is a policy.
  """
  stored = workdir_lib.read(workdir)
  if stored.data.name == "trajectories":
    raise UserError(
      f"--workdir={workdir}: a policy; its U-Net needs the normalizer and the "
      "observations of its environment, so only runs of images are exported"
    )
  experiment, params = workdir_lib.trained(config, workdir)
  plain = experiments.model_variant(stored, "without_kernels")
  experiment = dataclasses.replace(
    experiment,
    network=experiments.network(plain, experiment.dataset),
    mesh=sharding.make_mesh(devices=jax.devices()[:1]),
  )
  return Run(config, stored, experiment, jax.device_get(params))
