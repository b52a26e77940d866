"""Default values of the config fields that no component and no job declares.

They are the fields that several jobs share, or that identify an experiment.
"""

from collections.abc import Mapping
from typing import NamedTuple

from sdiff_jax.types import Json, UserError


class Renamed(NamedTuple):
  """A field that had another name or other values in an earlier version.

  Attributes:
    name: present name of the field.
    component: the only data set, network or loss that had the field; "" for any.
    values: old value -> new one.
  """

  name: str
  component: str = ""
  values: Mapping[str, str] = {}


# Fields that had another name or other values in an earlier version, by the old name.
# The command line refuses the old name with the new one in the message; `read` of a work
# directory accepts it.
RENAMED = {
  "conditional": Renamed("class_conditional"),
  "data.least": Renamed("data.min_range", "trajectories"),
  "demos.view": Renamed("data.frame", "trajectories"),
  "ema.posthoc": Renamed("ema.posthoc_std"),
  "evaluate.neighbours": Renamed("evaluate.pr_num_images"),
  "generate.negative": Renamed("generate.negative_prompt"),
  "generate.spacing": Renamed("generate.timestep_spacing"),
  "loss.segments": Renamed("loss.segment_boundaries"),
  "loss.stabiliser": Renamed("loss.tangent_normalizer"),
  "model.attention_at": Renamed("model.attn_resolutions"),
  "model.modulation": Renamed(
    "model.norm", "ddpmpp", {"double_norm": "double", "shift": "single"}
  ),
  "model.mults": Renamed("model.channel_mult", "edm2"),
  "model.norm": Renamed("model.norm", "edm2", {"scale": "single"}),
  "optim.final": Renamed("optim.end_lr_fraction"),
  "pod": Renamed("rehearse.topology"),
  "reference.least": Renamed("reference.min_range", "trajectories"),
  "rehearse.what": Renamed("rehearse.program"),
  "rollout.actions": Renamed("rollout.n_action_steps"),
  "rollout.filmed": Renamed("rollout.num_videos"),
  "rollout.noise": Renamed("rollout.noise_seed"),
  "rollout.timed": Renamed("rollout.num_timed"),
  "sample.compare": Renamed("sample.compare_sequential"),
  "sampler.angles": Renamed("sampler.timesteps"),
  "sampler.coarse": Renamed("sampler.coarse_workdir"),
  "sampler.rule": Renamed("sampler.update_rule"),
  "train.accumulate": Renamed("train.grad_accum_steps"),
}
# Sections and fields outside of jobs that may change between two runs in one work
# directory: they do not change what is trained.
RUNTIME = ("checkpoint", "init_from", "job", "mesh", "model.remat", "plugins")
RUNTIME += ("reference", "sample", "sampler", "teacher", "vae")


class Ranged(NamedTuple):
  """A default value with the range of its field.

  Attributes:
    default: the value.
    minimum: bound from below.
    exclusive: whether the bound itself is refused.
  """

  default: float
  minimum: float
  exclusive: bool

  def check(self, name: str, value: float) -> None:
    """Checks a value of the field.

    Raises:
      UserError: the value is out of range, or not a number.
    """
    if not (value > self.minimum or (value == self.minimum and not self.exclusive)):
      bound = "must be above 0" if self.exclusive else "must not be negative"
      raise UserError(f"config.{name}={value}: {bound}")


def positive(default: float) -> Ranged:
  """Returns a default whose field must be above 0.

  Args:
    default: value of the field.

  Example:
    >>> positive(0.5).default
    0.5
  """
  return Ranged(default, 0, exclusive=True)


def not_negative(default: float) -> Ranged:
  """Returns a default whose field must be 0 or above.

  Args:
    default: value of the field.

  Example:
    >>> not_negative(0.0).exclusive
    False
  """
  return Ranged(default, 0, exclusive=False)


DEFAULTS: dict[str, Json] = {
  "job": "train",  # what is done without --job
  "seed": 0,
  "sigma_d": positive(0.5),  # standard deviation that the data are scaled to
  # Data that `evaluate` compares with, a section like data; "" for data itself.
  "reference": {"name": ""},
  "class_conditional": True,  # the classes, if the data have some, are conditions
  # Work directory whose averaged weights the network starts from; "" for random ones.
  "init_from": "",
  "teacher": {
    "workdir": "",  # trained run to distill, for losses that need a teacher
    # Config file that trains the teacher, or the run of init_from, for messages.
    "config": "",
  },
  "optim": {
    "name": "adam",  # adam, adamw or radam
    "learning_rate": positive(1e-3),
    "schedule": "constant",  # constant, cosine or inverse_sqrt
    "rampup_images": 0,  # linear warm-up of the learning rate over this many images
    "end_lr_fraction": 0.0,  # cosine: final rate, as a fraction of learning_rate
    "reference_steps": 35_000,  # inverse_sqrt: constant until this step
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,  # adamw
    "clip": not_negative(0.0),  # maximal global norm of the gradient; 0 for none
  },
  "ema": {
    # "power/sigma_rel" (EDM2), "half_life/images" or "warmup/power" (Diffusion Policy:
    # decay 1 - n^-power); the first one is sampled from.
    "profiles": ("power/0.05",),
  },
  "checkpoint": {
    "every": positive(1000),  # steps
    "keep": positive(2),  # number of the newest checkpoints that are kept
    "keep_every": not_negative(0),  # steps between checkpoints kept for good; 0: none
  },
  "sampler": {
    # A solver of samplers/solvers (heun, ddim, ddpm, dpmpp2m, ...), run sequentially;
    # or in parallel with a prefix: para (ParaDiGMS), spec (speculative sampling, which
    # does not change the distribution) or srds (parareal). Examples: paraddpm,
    # specddpm, srdsddim.
    "name": "heun",
    "steps": 16,
    "timesteps": (),  # TrigFlow times of the steps, instead of the solver's grid
    "eta": 0.0,  # ddim: fraction of DDPM's noise
    "temperature": 1.0,  # factor of all noise; below 1 samples stay near the modes
    "window": 0,  # solver steps evaluated at a time; 0 chooses it by timing the network
    "tolerance": 0.1,  # para, srds: 1 is a tenth of the data's standard deviation
    "update_rule": "secant",  # para: secant, picard, linear or published
    "coarse_workdir": "",  # srds: work directory of a consistency model; "" for DDIM
  },
  "sample": {
    "num": positive(64),
    "batch_size": positive(64),  # over all devices
    "seed": 0,  # image k is made from seed + k alone
    "guidance": 1.0,  # scale of classifier-free guidance; 1 for none
    "label": -1,  # class of every image; -1 for all classes in turn
    "compare_sequential": False,  # also time the sequential sampler on one batch
    "checkpoint": 0,  # step to sample from (see checkpoint.keep_every); 0: the newest
  },
  # Autoencoder in the diffusers format, a folder or hf://organization/name: `encode`
  # computes latents by it, and samples of networks trained on latents become images.
  "vae": "",
  # Devices along each axis; -1 uses all that remain.
  "mesh": {"data": -1, "fsdp": 1, "window": 1},
}
