"""Makes tests/fixtures/diffusers_unets.npz and tiny-sdxl: Stable Diffusion XL.

  python3 -m venv /tmp/torch            # PyTorch is not a dependency of this project
  /tmp/torch/bin/pip install torch numpy diffusers transformers tokenizers
  /tmp/torch/bin/python third_party/diffusers_sdxl.py

Weights are random, of float16. Outputs and tangents of the U-Nets are of float64, as far
as the peer is; expected.npz holds latents and images of ten steps in float32.
"""

import json

import diffusers
import numpy as np
import torch
import transformers
from diffusers_folders import FIXTURES, NEGATIVE, PROMPT, VAE, clip, randomize, save
from torch.nn.attention import SDPBackend, sdpa_kernel

POOLED, TEXT = 6, 20
UNET = {"block_out_channels": [4, 8], "norm_num_groups": 2, "sample_size": 8}
UNET |= {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}
UNET |= {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}
UNET |= {"attention_head_dim": [1, 2], "use_linear_projection": True}
UNET |= {"transformer_layers_per_block": [1, 2], "cross_attention_dim": TEXT}
UNET |= {"layers_per_block": 1}
XL = UNET | {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
XL |= {"projection_class_embeddings_input_dim": 6 * 8 + POOLED}
LCM = UNET | {"time_cond_proj_dim": 12, "transformer_layers_per_block": 1}
NETWORKS = {"sdxl": XL, "lcm": LCM}


def networks() -> None:
  arrays = {}
  for name, config in NETWORKS.items():
    net = randomize(diffusers.UNet2DConditionModel(**config)).half()
    arrays |= {f"{name}/w/{k}": v.numpy() for k, v in net.state_dict().items()}
    net.double()
    x, text = torch.randn(2, 4, 8, 12).double(), torch.randn(2, 5, TEXT).double()
    pooled, scale = torch.randn(2, POOLED).double(), torch.tensor([8.5, 1.5]).double()
    ids = torch.tensor([[64, 96, 0, 0, 64, 96], [32, 48, 8, 4, 64, 96]]).double()
    time, dt = torch.tensor([700.0, 33.0]).double(), torch.tensor([1.0, -2.0]).double()
    dx = torch.randn_like(x)

    def call(x, time, net=net, text=text, pooled=pooled, ids=ids, scale=scale):
      given = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
      if width := net.config.time_cond_proj_dim:
        embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
        w = embed(None, scale - 1, embedding_dim=width, dtype=torch.float64)
        given = {"timestep_cond": w}
      return net(x, time, text, **given).sample

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
      out, tangent = torch.func.jvp(call, (x, time), (dx, dt))
    values = {"x": x, "time": time, "text": text, "pooled": pooled, "dx": dx, "dt": dt}
    values |= {"distilled_guidance": scale, "time_ids": ids}
    values |= {"out": out, "tangent": tangent}
    arrays |= {f"{name}/{k}": v.numpy() for k, v in values.items()}
  configs = {
    k: v | {"_class_name": "UNet2DConditionModel"} for k, v in NETWORKS.items()
  }
  file = FIXTURES / "diffusers_unets.npz"
  np.savez_compressed(file, **arrays, configs=json.dumps(configs))
  print(f"{file}: {file.stat().st_size} bytes")


def folder() -> None:
  tokenizer = transformers.CLIPTokenizer.from_pretrained(
    FIXTURES / "tiny-sd2" / "tokenizer"
  )
  vae = VAE | {"shift_factor": None, "latent_channels": 4}
  vae |= {"use_quant_conv": True, "use_post_quant_conv": True}
  parts = {
    "unet": diffusers.UNet2DConditionModel(**XL),
    "vae": diffusers.AutoencoderKL(**vae),
    "text_encoder": clip(8),
    "text_encoder_2": clip(12, POOLED),
  }
  for part in parts.values():
    randomize(part)
  parts |= {"tokenizer": tokenizer, "tokenizer_2": tokenizer}
  parts["scheduler"] = diffusers.EulerDiscreteScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
    timestep_spacing="leading", steps_offset=1,
  )  # fmt: skip
  pipe = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
  pipe.set_progress_bar_config(disable=True)
  save(pipe, FIXTURES / "tiny-sdxl", parts)
  x = torch.randn(1, 4, 8, 12)
  for file, negative in (("expected", None), ("expected_negative", NEGATIVE)):
    options = {"guidance_scale": 5.0, "negative_prompt": negative}
    given = options | {"height": 16, "width": 24, "num_inference_steps": 10}
    out = pipe(PROMPT, latents=x, output_type="latent", **given).images
    image = pipe(PROMPT, latents=x, output_type="np", **given).images
    meta = {"prompt": PROMPT, "steps": 10, "guidance_scale": 5.0}
    meta["negative_prompt"] = negative or ""
    arrays = {"latents_in": x, "latents_out": out, "image": image}
    np.savez_compressed(
      FIXTURES / "tiny-sdxl" / f"{file}.npz", meta=json.dumps(meta), **arrays
    )
    print(file, float(out.abs().max()))


if __name__ == "__main__":
  torch.manual_seed(0)
  networks()
  with torch.no_grad():
    folder()
