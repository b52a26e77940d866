"""Makes tests/fixtures/diffusers_sana.npz, tiny-sana and tiny-sana-sprint.

  python3 -m venv /tmp/torch            # PyTorch is not a dependency of this project
  /tmp/torch/bin/pip install torch numpy diffusers transformers tokenizers
  /tmp/torch/bin/python third_party/diffusers_sana.py

Weights are random, of float16. Outputs and tangents of the networks are of float64, as
far as the peer is; expected.npz holds latents and images in float32.
"""

import json

import diffusers
import numpy as np
import tokenizers
import torch
import transformers
from diffusers_folders import FIXTURES, NEGATIVE, PROMPT, randomize, save
from torch.nn.attention import SDPBackend, sdpa_kernel

INSTRUCTION = ["The cat or the dog:", "User Prompt: "]
WIDTH = 12  # of the text
SANA = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 3}
SANA |= {"attention_head_dim": 4, "num_layers": 2, "num_cross_attention_heads": 2}
SANA |= {"cross_attention_head_dim": 6, "cross_attention_dim": 12}
SANA |= {"caption_channels": WIDTH, "sample_size": 32}
SPRINT = SANA | {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
LARGE = SANA | {"patch_size": 2, "interpolation_scale": 2, "attention_bias": True}
NETWORKS = {"sana": SANA, "sprint": SPRINT, "large": LARGE | {"sample_size": 8}}
LEVELS = {"block_types": ["ResBlock", "EfficientViTBlock"], "layers_per_block": [1, 1]}
LEVELS |= {"block_out_channels": [4, 8], "qkv_multiscales": [[], [3]]}
VAE = {f"{half}_{k}": v for half in ("encoder", "decoder") for k, v in LEVELS.items()}
VAE |= {"latent_channels": 4, "attention_head_dim": 4, "scaling_factor": 0.5}
VAE |= {"upsample_block_type": "interpolate", "downsample_block_type": "Conv"}
DEEP = {f"{half}_layers_per_block": [0, 1] for half in ("encoder", "decoder")}
DEEP |= {"upsample_block_type": "pixel_shuffle"}
DEEP |= {"downsample_block_type": "pixel_unshuffle", "latent_channels": 2}
AUTOENCODERS = {"dc": VAE, "deep": VAE | DEEP}
GEMMA = {"vocab_size": 32, "hidden_size": WIDTH, "intermediate_size": 16}
GEMMA |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
GEMMA |= {"head_dim": 4, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0}


def numpy(name: str, values: dict) -> dict:
  return {f"{name}/{k}": v.detach().numpy() for k, v in values.items()}


def transformer(name: str, config: dict) -> dict:
  net = randomize(diffusers.SanaTransformer2DModel(**config)).half()
  arrays = {f"{name}/w/{k}": v.numpy() for k, v in net.state_dict().items()}
  net.double()
  x, text = torch.randn(2, 4, 4, 6).double(), torch.randn(2, 5, WIDTH).double()
  mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
  time, dt = torch.tensor([700.0, 33.0]).double(), torch.tensor([1.0, -2.0]).double()
  guidance, dx = torch.tensor([4.5, 1.5]).double(), torch.randn_like(x)
  if name == "sprint":
    time, dt = time / 1000, dt / 1000
  own = guidance * net.config.guidance_embeds_scale if name == "sprint" else None

  def call(x, time):
    options = {"guidance": own, "encoder_attention_mask": mask}
    return net(x, encoder_hidden_states=text, timestep=time, **options).sample

  with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
    out, tangent = torch.func.jvp(call, (x, time), (dx, dt))
  values = {"x": x, "time": time, "text": text, "mask": mask, "dx": dx, "dt": dt}
  values |= {"distilled_guidance": guidance, "out": out, "tangent": tangent}
  return arrays | numpy(name, values)


def autoencoder(name: str, config: dict) -> dict:
  net = randomize(diffusers.AutoencoderDC(**config)).half()
  arrays = {f"{name}/w/{k}": v.numpy() for k, v in net.state_dict().items()}
  net.double()
  images = torch.randn(1, 3, 8, 12).double()
  with torch.no_grad():
    latents = net.encode(images).latent
    decoded = net.decode(latents).sample
  return arrays | numpy(
    name, {"images": images, "latents": latents, "decoded": decoded}
  )


def gemma() -> dict:
  # Its constants stay in float32.
  net = randomize(transformers.Gemma2Model(transformers.Gemma2Config(**GEMMA)))
  arrays = {f"gemma/w/{k}": v.half().numpy() for k, v in net.state_dict().items()}
  net.double()
  ids = torch.tensor([[2, 5, 9, 0, 0], [2, 7, 4, 3, 11]])
  with torch.no_grad():
    hidden = net(ids, attention_mask=(ids != 0).long()).last_hidden_state
  return arrays | numpy("gemma", {"ids": ids, "hidden": hidden})


def tokenizer() -> transformers.PreTrainedTokenizerFast:
  words = [f"\u2581{w}" for w in ("a", "the", "cat", "dog", "on", "mat")]
  pieces = [("<pad>", 0.0), ("<eos>", 0.0), ("<bos>", 0.0), ("<unk>", -9.0)]
  pieces += [(w, -1.0 - k / 9) for k, w in enumerate([*words, "\u2581", *"acdegmnot"])]
  model = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=3))
  model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  model.post_processor = tokenizers.processors.TemplateProcessing(
    single="<bos> $A", special_tokens=[("<bos>", 2)]
  )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=model, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
    pad_token="<pad>", padding_side="right",
  )  # fmt: skip


def folders() -> None:
  shared = {
    "vae": randomize(diffusers.AutoencoderDC(**VAE)),
    "text_encoder": randomize(
      transformers.Gemma2Model(transformers.Gemma2Config(**GEMMA))
    ),
    "tokenizer": tokenizer(),
  }
  flow = diffusers.DPMSolverMultistepScheduler(
    prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
  )
  options = {"height": 32, "width": 32, "use_resolution_binning": False}  # not used
  options |= {"complex_human_instruction": INSTRUCTION}
  about = {"prompt": PROMPT, "instruction": "\n".join(INSTRUCTION)}
  x = torch.randn(1, 4, 4, 6)
  for folder, kind, config, schedule, runs in (
    ("tiny-sana", diffusers.SanaPipeline, SANA, flow,
     {10: {"guidance_scale": 4.5, "negative_prompt": NEGATIVE}}),
    ("tiny-sana-sprint", diffusers.SanaSprintPipeline, SPRINT,
     diffusers.SCMScheduler(), {n: {"guidance_scale": 4.5} for n in (1, 2, 4)}),
  ):  # fmt: skip
    net = randomize(diffusers.SanaTransformer2DModel(**config))
    parts = shared | {"transformer": net, "scheduler": schedule}
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    save(pipe, FIXTURES / folder, parts)
    # What folders of SANA name, made by another version of the package.
    index = FIXTURES / folder / "model_index.json"
    text = index.read_text().replace("TokenizersBackend", "GemmaTokenizerFast")
    index.write_text(text)
    tokens = {
      "ids": pipe.tokenizer("\n".join(INSTRUCTION) + PROMPT).input_ids,
      "negative_ids": pipe.tokenizer(NEGATIVE).input_ids,
    }
    for steps, own in runs.items():
      given = options | own | {"num_inference_steps": steps}
      if folder.endswith("sprint"):
        given["intermediate_timesteps"] = 1.3 if steps == 2 else None
      noise = torch.Generator().manual_seed(steps)
      drawn = [torch.randn(x.shape, generator=noise) for _ in range(steps)]
      outs = [
        pipe(
          PROMPT, latents=x, output_type=form,
          generator=torch.Generator().manual_seed(steps), **given,
        ).images
        for form in ("latent", "np")
      ]  # fmt: skip
      arrays = {"latents_in": x, "latents_out": outs[0], "image": outs[1]}
      arrays |= tokens | {"noise": torch.stack(drawn)}
      meta = json.dumps(about | own | {"steps": steps})
      np.savez_compressed(
        FIXTURES / folder / f"expected_{steps}.npz", meta=meta, **arrays
      )
      print(folder, steps, float(outs[0].abs().max()))


def main() -> None:
  torch.manual_seed(0)
  arrays = gemma()
  for name, config in NETWORKS.items():
    arrays |= transformer(name, config)
  for name, config in AUTOENCODERS.items():
    arrays |= autoencoder(name, config)
  configs = {
    k: v | {"_class_name": "SanaTransformer2DModel"} for k, v in NETWORKS.items()
  }
  configs |= {k: v | {"_class_name": "AutoencoderDC"} for k, v in AUTOENCODERS.items()}
  configs["gemma"] = GEMMA | {"architectures": ["Gemma2Model"]}
  file = FIXTURES / "diffusers_sana.npz"
  np.savez_compressed(file, **arrays, configs=json.dumps(configs))
  print(f"{file}: {file.stat().st_size} bytes")
  with torch.no_grad():
    folders()


if __name__ == "__main__":
  main()
