"""Makes tests/fixtures/diffusers_dit.npz and tiny-dit: DiT with classes, of diffusers.

  python3 -m venv /tmp/torch            # PyTorch is not a dependency of this project
  /tmp/torch/bin/pip install torch numpy diffusers
  /tmp/torch/bin/python third_party/diffusers_dit.py

Weights are random, of float16. Outputs and tangents of the network are of float64, with
times embedded in float64, too; latents of ten steps are of float32.
"""

import copy
import json
import math
import pathlib
import shutil

import diffusers
import numpy as np
import torch
from diffusers.models import embeddings
from torch.nn.attention import SDPBackend, sdpa_kernel

FIXTURES = pathlib.Path(__file__).parents[1] / "tests" / "fixtures"
NET = {"attention_head_dim": 8, "num_attention_heads": 2, "num_layers": 2}
NET |= {"in_channels": 4, "out_channels": 8, "sample_size": 8, "num_embeds_ada_norm": 3}
VAE = {"block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1}
VAE |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "scaling_factor": 0.5}
VAE |= {"up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 4}
LABELS = {"0": "tench, Tinca tinca", "1": "goldfish", "2": "white shark, man-eater"}
SCHEDULERS = {
  "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
  "dpmsolver": (diffusers.DPMSolverMultistepScheduler, {}),
}


def exact_times(timesteps, embedding_dim, flip_sin_to_cos, downscale_freq_shift, **_):
  """The peer's embedding of times, without its rounding to float32."""
  half = embedding_dim // 2
  powers = torch.arange(half, dtype=torch.float64) / (half - downscale_freq_shift)
  angles = timesteps[:, None].double() * torch.exp(-math.log(10_000) * powers)[None]
  waves = [torch.sin(angles), torch.cos(angles)]
  return torch.cat(waves[::-1] if flip_sin_to_cos else waves, dim=-1)


def randomize(net: torch.nn.Module) -> torch.nn.Module:
  for p in net.parameters():
    p.data = (p.data + 0.3 * torch.randn_like(p) / max(p.shape[-1], 4) ** 0.5).half()
  return net.eval().float()


def network() -> None:
  plain, embeddings.get_timestep_embedding = (
    embeddings.get_timestep_embedding,
    exact_times,
  )
  net = randomize(diffusers.DiTTransformer2DModel(**NET, norm_eps=1e-3))
  arrays = {f"w/{k}": v.half().numpy() for k, v in net.state_dict().items()}
  net.double()
  x, dx = torch.randn(2, 3, 4, 12, 12).double()[:, :2].unbind(0)
  time, dt = torch.tensor([[700.0, 33.0], [1.0, -2.0]]).double().unbind(0)
  labels = torch.tensor([2, 3])  # 3 is no class

  def call(x, time):
    return net(x, time, labels).sample[:, :4]

  with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
    out, tangent = torch.func.jvp(call, (x, time), (dx, dt))
  values = {"x": x, "time": time, "dx": dx, "dt": dt, "out": out, "tangent": tangent}
  arrays |= {k: v.numpy() for k, v in values.items()}
  arrays["config"] = json.dumps(dict(net.config))
  np.savez_compressed(FIXTURES / "diffusers_dit.npz", **arrays)
  embeddings.get_timestep_embedding = plain


def folder() -> None:
  where = FIXTURES / "tiny-dit"
  shutil.rmtree(where, ignore_errors=True)
  net = randomize(diffusers.DiTTransformer2DModel(**NET))
  vae = randomize(diffusers.AutoencoderKL(**VAE))
  x, arrays = torch.randn(2, 4, 8, 8), {}
  for name, (kind, options) in SCHEDULERS.items():
    pipe = diffusers.DiTPipeline(net, vae, kind(**options), id2label=LABELS)
    pipe.set_progress_bar_config(disable=True)
    diffusers.pipelines.dit.pipeline_dit.randn_tensor = lambda *_, **__: x
    # The peer's class of no image is 1000; that of this network is 3.
    table = [b.norm1.emb.class_embedder for b in net.transformer_blocks]
    hooks = [t.register_forward_pre_hook(no_class) for t in table]
    kept = []
    decode = vae.decode
    vae.decode = lambda z, decode=decode, kept=kept: (kept.append(z), decode(z))[1]
    image = pipe([2, 0], guidance_scale=2.0, num_inference_steps=10, output_type="np")
    vae.decode = decode
    for hook in hooks:
      hook.remove()
    arrays[f"{name}_latents"] = kept[0] * vae.config.scaling_factor
    arrays[f"{name}_image"] = image.images
    if name == "ddim":
      pipe.save_pretrained(where)
      for part, module in (("transformer", net), ("vae", vae)):
        shutil.rmtree(where / part)
        half = copy.deepcopy(module).half()  # which would round the positions, too
        half.save_pretrained(where / part, variant="fp16")
  # As the published folder has it.
  for file, edit in (
    ("transformer/config.json", {"_class_name": "Transformer2DModel"}),
    ("model_index.json", {"transformer": ["diffusers", "Transformer2DModel"]}),
    ("model_index.json", {"id2label": LABELS}),
  ):
    path = where / file
    path.write_text(json.dumps(json.loads(path.read_text()) | edit, indent=2) + "\n")
  np.savez_compressed(where / "expected.npz", latents_in=x, **arrays)


def no_class(_, inputs: tuple) -> tuple:
  return (torch.where(inputs[0] == 1000, 3, inputs[0]), *inputs[1:])


if __name__ == "__main__":
  torch.manual_seed(0)
  with torch.no_grad():
    network()
    folder()
