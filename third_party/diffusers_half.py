"""The half of diffusers_paradigms.py that runs diffusers; started by it.

  PYTHON-WITH-TORCH-AND-DIFFUSERS third_party/diffusers_half.py FOLDER

FOLDER has the network's arrays and the settings of torch_half.py, and cases.json.
"""

import json
import os
import time

import numpy as np
import torch
from diffusers import DDIMParallelScheduler, DDPMParallelScheduler
from diffusers import StableDiffusionParadigmsPipeline as Pipeline
from torch_half import FOLDER, SHAPE, load

CASES = json.loads((FOLDER / "cases.json").read_text())
SCHEDULERS = {"ddpm": DDPMParallelScheduler, "ddim": DDIMParallelScheduler}
COMMON = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
COMMON |= {"clip_sample": False}


class Unet(torch.nn.Module):
  """Our network as the pipeline wants to call it: v of x at a timestep."""

  def __init__(self, net, abar, labels):
    super().__init__()
    self.net, self.labels, self.calls = net, labels, []
    self.angles = abar.sqrt().arccos().float()
    side, _, channels = SHAPE
    fields = {"sample_size": side, "in_channels": channels, "time_cond_proj_dim": None}
    self.config = type("Config", (), fields)()

  @property
  def device(self):
    return torch.device("cpu")

  @property
  def dtype(self):
    return torch.float32

  def forward(self, x, t, encoder_hidden_states=None, **kwargs):
    self.calls.append(len(x))
    labels = self.labels.repeat(len(x) // len(self.labels))
    x = x.movedim(1, -1)
    return (self.net(x, self.angles[t], labels).movedim(-1, 1),)


def run(case, arrays):
  """Returns the samples, passes, evaluations of a sample, and seconds."""
  steps, batch = case["steps"], case["batch"]
  scheduler = SCHEDULERS[case["kind"]](
    num_train_timesteps=case["train_steps"], **COMMON
  )
  labels = torch.arange(batch) % 10
  net = load(arrays, "student").requires_grad_(False)
  unet = Unet(net, scheduler.alphas_cumprod.double(), labels)
  none = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
  pipeline = Pipeline(
    **none,
    unet=unet,
    scheduler=scheduler,
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
  )
  pipeline.set_progress_bar_config(disable=True)
  pipeline.vae_scale_factor = 1
  pipeline.check_inputs = lambda *args: None  # which wants sizes that 8 divides
  settings = {"num_inference_steps": steps, "guidance_scale": 1.0}
  settings |= {"prompt_embeds": torch.zeros(batch, 1, 1), "output_type": "latent"}

  def once(parallel, tolerance):
    unet.calls.clear()
    begin = time.perf_counter()
    made = pipeline(
      latents=torch.tensor(arrays["x"][:batch]).movedim(-1, 1),
      generator=torch.Generator().manual_seed(0),
      parallel=parallel,
      tolerance=tolerance,
      **settings,
    )
    return made.images, time.perf_counter() - begin

  images, _ = once(case["window"], case["tolerance"])
  calls = list(unet.calls)
  seconds = sorted(once(case["window"], case["tolerance"])[1] for _ in range(5))[2]
  alone, _ = once(1, 0.0)
  off = (images - alone).square().mean().sqrt() / alone.square().mean().sqrt()
  return {
    "passes": len(calls),
    "evaluations": sum(calls) / batch,
    "seconds": seconds,
    "error": off.item(),
  }


def main():
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  arrays = dict(np.load(FOLDER / "ours.npz"))
  with torch.no_grad():
    rows = [run(case, arrays) for case in CASES]
  (FOLDER / "rows.json").write_text(json.dumps(rows))


main()
