"""Makes tests/fixtures/diffusers_pixart.npz and tiny-pixart.

  python3 -m venv /tmp/torch            # PyTorch is not a dependency of this project
  /tmp/torch/bin/pip install torch numpy diffusers transformers tokenizers sentencepiece
  /tmp/torch/bin/python third_party/diffusers_pixart.py

Weights are random, of float16. Outputs and tangents of the networks are of float64, as
far as the peer is; expected.npz holds latents and images in float32.
"""

import json

import diffusers
import numpy as np
import torch
import transformers
from diffusers_folders import (
  FIXTURES,
  NEGATIVE,
  PROMPT,
  T5,
  VAE,
  randomize,
  save,
  t5_tokenizer,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

WIDTH = 10  # of the text
NET = {"num_attention_heads": 3, "attention_head_dim": 4, "num_layers": 2}
NET |= {"cross_attention_dim": 12, "caption_channels": WIDTH}
ALPHA = NET | {"sample_size": 128}  # is told the size of the image
SIGMA = NET | {"sample_size": 8, "use_additional_conditions": False}
NETWORKS = {"alpha": ALPHA, "sigma": SIGMA}


def network(name: str, config: dict) -> dict:
  net = randomize(diffusers.PixArtTransformer2DModel(**config)).half()
  arrays = {f"{name}/w/{k}": v.numpy() for k, v in net.state_dict().items()}
  net.double()
  x, text = torch.randn(2, 4, 8, 12).double(), torch.randn(2, 5, WIDTH).double()
  mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
  time, dt = torch.tensor([700.0, 33.0]).double(), torch.tensor([1.0, -2.0]).double()
  ids = torch.tensor([[64, 96, 0, 0, 64, 96], [32, 48, 8, 4, 96, 64]]).double()
  dx, size = torch.randn_like(x), ids[:, 4:]
  added = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}

  def call(x, time):
    options = {"added_cond_kwargs": added, "encoder_attention_mask": mask}
    return net(x, encoder_hidden_states=text, timestep=time, **options).sample

  with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
    out, tangent = torch.func.jvp(call, (x, time), (dx, dt))
  values = {"x": x, "time": time, "text": text, "mask": mask, "dx": dx, "dt": dt}
  values |= {"time_ids": ids, "out": out, "tangent": tangent}
  return arrays | {f"{name}/{k}": v.numpy() for k, v in values.items()}


def folder() -> None:
  vae = VAE | {"shift_factor": None, "latent_channels": 4}
  vae |= {"use_quant_conv": True, "use_post_quant_conv": True}
  parts = {
    "transformer": randomize(diffusers.PixArtTransformer2DModel(**ALPHA)),
    "vae": randomize(diffusers.AutoencoderKL(**vae)),
    "text_encoder": randomize(
      transformers.T5EncoderModel(transformers.T5Config(**T5, d_model=WIDTH))
    ),
    "tokenizer": t5_tokenizer(),
    "scheduler": diffusers.DPMSolverMultistepScheduler(),
  }
  pipe = diffusers.PixArtAlphaPipeline(**parts)
  pipe.set_progress_bar_config(disable=True)
  save(pipe, FIXTURES / "tiny-pixart", parts)
  x = torch.randn(1, 4, 8, 12)
  options = {"guidance_scale": 4.5, "negative_prompt": NEGATIVE}
  given = options | {"height": 16, "width": 24, "num_inference_steps": 10}
  given |= {"use_resolution_binning": False, "clean_caption": False, "latents": x}
  out, image = (
    pipe(PROMPT, output_type=form, **given).images for form in ("latent", "np")
  )
  meta = json.dumps({"prompt": PROMPT, "steps": 10} | options)
  arrays = {"latents_in": x, "latents_out": out, "image": image}
  np.savez_compressed(FIXTURES / "tiny-pixart" / "expected.npz", meta=meta, **arrays)
  print("tiny-pixart", float(out.abs().max()))


def main() -> None:
  torch.manual_seed(0)
  arrays = {}
  for name, config in NETWORKS.items():
    arrays |= network(name, config)
  configs = {
    k: v | {"_class_name": "PixArtTransformer2DModel"} for k, v in NETWORKS.items()
  }
  file = FIXTURES / "diffusers_pixart.npz"
  np.savez_compressed(file, **arrays, configs=json.dumps(configs))
  print(f"{file}: {file.stat().st_size} bytes")
  with torch.no_grad():
    folder()


if __name__ == "__main__":
  main()
