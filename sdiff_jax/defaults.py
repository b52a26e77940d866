"""The config fields that no component and no job declares.

They are the fields that several jobs share, or that identify an experiment.
"""

import dataclasses
from typing import Annotated, Literal

from sdiff_jax.fields import (
  Count,
  Fraction,
  HubPath,
  Index,
  Length,
  NotNegative,
  Path,
  Positive,
  Range,
  Rate,
  Seed,
  Timesteps,
)

Devices = Annotated[int, Range(-1, 1_000_000)]

# Section of a component -> kind of the component.
PIECES = {"data": "data", "reference": "data", "model": "models", "loss": "losses"}
# Sections and fields outside of jobs that may change between two runs in one work
# directory: they do not change what is trained.
RUNTIME = ("checkpoint", "init_from", "job", "mesh", "plugins")
RUNTIME += ("model.folder", "model.remat", "model.scan_blocks")
RUNTIME += ("reference", "sample", "sampler", "text_encoder", "vae")
RUNTIME += ("teacher.config", "teacher.folder", "teacher.weak_workdir")
RUNTIME += ("teacher.workdir",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class General:
  """Fields outside of sections.

  Attributes:
    job: what is done without --job.
    seed: of the parameters, of the order of the data and of the noise of training.
    sigma_d: standard deviation that the data are scaled to.
    class_conditional: whether the classes, if the data have some, are conditions.
    init_from: work directory whose averaged weights the network starts from, or a folder
      in the diffusers format, or hf://organization/name; "" for random ones.
    vae: autoencoder in the diffusers format, a folder or hf://organization/name:
      `encode` computes latents by it, and samples of networks trained on latents become
      images.
    text_encoder: folder in the diffusers format, or hf://organization/name, whose text
      encoders turn captions and prompts into conditions.
    plugins: modules outside this package that register components or jobs.
  """

  job: str = "train"
  seed: Seed = 0
  sigma_d: Annotated[float, Range(1e-6, 1e6)] = 0.5
  class_conditional: bool = True
  init_from: HubPath = ""
  vae: HubPath = ""
  text_encoder: HubPath = ""
  plugins: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
  """The network that is distilled.

  Attributes:
    workdir: trained run to distill, for losses that need a teacher.
    folder: published model to distill in place of a run, a folder in the diffusers format
      or hf://organization/name; "" for none.
    config: config file that trains the teacher, or the run of init_from, for messages.
    weak_workdir: a worse network of the same data (smaller, or less trained), by which the
      teacher is guided (autoguidance); "" for none.
    weak_checkpoint: step of its weights; 0 for the newest.
    autoguidance: scale of that guidance; 1 for none.
    trajectories: folder of stored trajectories of the teacher (--job=trajectories) that
      the loss is trained on in place of data, for losses that take them; "" for none.
  """

  workdir: Path = ""
  folder: HubPath = ""
  config: str = ""
  weak_workdir: Path = ""
  weak_checkpoint: Index = 0
  autoguidance: Annotated[float, Range(0, 1000)] = 1.0
  trajectories: Path = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
  """Low-rank adapters, which are trained in place of the weights of the network.

  Attributes:
    rank: of the adapters; 0 trains the weights.
    alpha: the adapters are multiplied by alpha / rank; 0 for rank, a factor of 1.
    targets: regular expression of the names of the weights that get adapters, such as
      "mid_block.attentions.0.transformer_blocks.0.attn1/to_q/kernel".
  """

  rank: Annotated[int, Range(0, 4096)] = 0
  alpha: NotNegative = 0.0
  targets: str = r"to_[qkv]|to_out|query|key|value|attn|attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim:
  """The optimizer and its learning rate.

  Attributes:
    name: of the optimizer.
    learning_rate: before any decay.
    schedule: of the learning rate; "inverse_sqrt" is EDM2's.
    rampup_images: linear warm-up of the learning rate over this many images.
    end_lr_fraction: "cosine": final rate, as a fraction of learning_rate.
    reference_steps: "inverse_sqrt": constant until this step.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the square root of the second moment.
    weight_decay: decoupled weight decay, of "adamw" alone.
    clip: maximal global norm of the gradient; 0 for none.
  """

  name: Literal["adam", "adamw", "radam"] = "adam"
  learning_rate: Positive = 1e-3
  schedule: Literal["constant", "cosine", "inverse_sqrt"] = "constant"
  rampup_images: Index = 0
  end_lr_fraction: Fraction = 0.0
  reference_steps: Count = 35_000
  b1: Rate = 0.9
  b2: Rate = 0.999
  eps: NotNegative = 1e-8
  weight_decay: NotNegative = 0.0
  clip: NotNegative = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ema:
  """Averages of the parameters.

  Attributes:
    profiles: of the averages, the first of which is sampled from: "power/sigma_rel"
      (EDM2), "half_life/images" or "warmup/power" (Diffusion Policy: decay 1 - n^-power).
  """

  profiles: Annotated[tuple[str, ...], Length(1, 16)] = ("power/0.05",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
  """When checkpoints are written, and which of them are kept.

  Attributes:
    every: steps between checkpoints.
    keep: number of the newest checkpoints that are kept.
    keep_every: steps between checkpoints that are kept permanently; 0 for none.
  """

  every: Count = 1000
  keep: Count = 2
  keep_every: Index = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
  """The sampler; its further fields are the options of solvers and sampling loops.

  Attributes:
    name: of a solver of samplers/solvers (heun, ddim, ddpm, dpmpp2m, ...), run
      sequentially, or in parallel with a prefix: para (ParaDiGMS), spec (speculative
      sampling, which does not change the distribution) or srds (parareal). Examples:
      paraddpm, specddpm, srdsddim.
    steps: number of solver steps.
    timesteps: TrigFlow times at which steps start, instead of the solver's grid.
    temperature: factor of all noise; below 1 samples stay near the modes.
    coarse_workdir: srds: work directory of a consistency model; "" for DDIM.
  """

  name: str = "heun"
  steps: Annotated[int, Range(1, 100_000)] = 16
  timesteps: Timesteps = ()
  temperature: NotNegative = 1.0
  coarse_workdir: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """The samples of a trained network.

  Attributes:
    num: number of samples.
    batch_size: samples of a batch, over all devices.
    seed: sample k is computed from seed + k alone.
    guidance: scale of classifier-free guidance; 1 for none.
    label: class of every sample; -1 for all classes in turn.
    prompts: texts in turn, separated by ";", or a .json file of COCO's captions; "" for
      those of the data. `text_encoder` encodes them.
    compare_sequential: whether the sequential sampler is also timed on one batch.
    checkpoint: step to sample from (see checkpoint.keep_every); 0 for the newest.
  """

  num: Count = 64
  batch_size: Count = 64
  seed: Seed = 0
  guidance: Annotated[float, Range(0, 1000)] = 1.0
  label: Annotated[int, Range(-1)] = -1
  prompts: str = ""
  compare_sequential: bool = False
  checkpoint: Index = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
  """Devices along each axis of the mesh; -1 uses all that remain.

  Attributes:
    data: of batches.
    fsdp: of batches, with parameters sharded.
    window: of the window of parallel samplers.
  """

  data: Devices = -1
  fsdp: Devices = 1
  window: Devices = 1


SECTIONS = {
  "": General,
  "teacher": Teacher,
  "lora": Lora,
  "optim": Optim,
  "ema": Ema,
  "checkpoint": Checkpoint,
  "sampler": Sampler,
  "sample": Sample,
  "mesh": Mesh,
}
