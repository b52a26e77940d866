"""Makes tests/fixtures/diffusers_transformers.npz: small transformers of diffusers.

  python3 -m venv /tmp/torch            # PyTorch is not a dependency of this project
  /tmp/torch/bin/pip install torch numpy diffusers transformers
  /tmp/torch/bin/python third_party/diffusers_transformers.py

Weights are random; outputs and tangents are of float64, as far as the peer is.
"""

import json
import pathlib

import numpy as np
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel

FILE = pathlib.Path(__file__).parents[1] / "tests" / "fixtures"
FILE /= "diffusers_transformers.npz"
COMMON = {"attention_head_dim": 8, "num_attention_heads": 2}
COMMON |= {"joint_attention_dim": 12, "pooled_projection_dim": 10}
SD3 = COMMON | {"sample_size": 8, "in_channels": 4, "out_channels": 4}
SD3 |= {"caption_projection_dim": 16, "pos_embed_max_size": 6, "num_layers": 2}
FLUX = COMMON | {"in_channels": 16, "num_layers": 1, "num_single_layers": 2}
FLUX |= {"axes_dims_rope": [2, 2, 4]}
NETWORKS = {
  "sd3": (SD3Transformer2DModel, SD3),
  "sd35": (
    SD3Transformer2DModel,
    SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": [0]},
  ),
  "flux": (FluxTransformer2DModel, FLUX | {"guidance_embeds": True}),
  "schnell": (FluxTransformer2DModel, FLUX),
}


def pack(x: torch.Tensor) -> torch.Tensor:
  b, c, h, w = x.shape
  x = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
  return x.reshape(b, h * w // 4, c * 4)


def unpack(x: torch.Tensor, h: int, w: int) -> torch.Tensor:
  b, _, c = x.shape
  x = x.view(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
  return x.reshape(b, c // 4, h, w)


def main() -> None:
  torch.manual_seed(0)
  arrays, configs = {}, {}
  for name, (kind, config) in NETWORKS.items():
    net = kind(**config).eval()
    for p in net.parameters():
      p.data = (p.data + 0.2 * torch.randn_like(p) / max(p.shape[-1], 4) ** 0.5).half()
    state = net.half().state_dict()
    arrays |= {f"{name}/w/{k}": v.numpy() for k, v in state.items()}
    net.double()
    x = torch.randn(2, 4, 8, 4).double()
    x = torch.randn(2, 4, 8, 12).double() if "sd3" in name else x  # cropped positions
    text, pooled = torch.randn(2, 5, 12).double(), torch.randn(2, 10).double()
    time = torch.tensor([700.0, 33.0]).double()
    guidance = torch.tensor([3.5, 1.0]).double()
    dx, dt = torch.randn_like(x), torch.tensor([1.0, -2.0]).double()

    def call(x, time, net=net, text=text, pooled=pooled, guidance=guidance, name=name):
      shared = {"encoder_hidden_states": text, "pooled_projections": pooled}
      if "sd3" in name:
        return net(x, timestep=time, **shared).sample
      h, w = x.shape[2:]
      ids = torch.zeros(h // 2, w // 2, 3)
      ids[..., 1] += torch.arange(h // 2)[:, None]
      ids[..., 2] += torch.arange(w // 2)[None]
      shared |= {"img_ids": ids.reshape(-1, 3), "txt_ids": torch.zeros(5, 3)}
      shared["guidance"] = guidance if name == "flux" else None
      out = net(pack(x), timestep=time / 1000, **shared).sample
      return unpack(out, h, w)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
      out, tangent = torch.func.jvp(call, (x, time), (dx, dt))
    values = {"x": x, "time": time, "text": text, "pooled": pooled, "dx": dx, "dt": dt}
    values |= {"guidance": guidance, "out": out, "tangent": tangent}
    arrays |= {f"{name}/{k}": v.numpy() for k, v in values.items()}
    configs[name] = config | {"_class_name": kind.__name__}
  np.savez_compressed(FILE, **arrays, configs=json.dumps(configs))
  print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
  main()
