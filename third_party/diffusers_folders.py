"""Makes tests/fixtures/tiny-sd3 and tiny-flux: small pipelines of diffusers.

  python3 -m venv /tmp/torch            # PyTorch is not a dependency of this project
  /tmp/torch/bin/pip install torch numpy diffusers transformers tokenizers
  /tmp/torch/bin/python third_party/diffusers_folders.py

Weights are random, of float16; expected.npz holds latents and images of ten steps in
float32, from prompts.
"""

import json
import pathlib
import shutil

import diffusers
import numpy as np
import tokenizers
import torch
import transformers

FIXTURES = pathlib.Path(__file__).parents[1] / "tests" / "fixtures"
PROMPT, NEGATIVE = "a cat on the mat", "the dog"
CLIP = {"vocab_size": 64, "intermediate_size": 16, "num_hidden_layers": 2}
CLIP |= {"num_attention_heads": 2, "max_position_embeddings": 12, "eos_token_id": 62}
CLIP |= {"bos_token_id": 0, "pad_token_id": 1}
T5 = {"vocab_size": 24, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
T5 |= {"feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 8}
T5 |= {"relative_attention_max_distance": 16}
VAE = {"block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1}
VAE |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "shift_factor": 0.1}
VAE |= {"up_block_types": ["UpDecoderBlock2D"] * 2, "scaling_factor": 1.5}
VAE |= {"use_quant_conv": False, "use_post_quant_conv": False}
NET = {"attention_head_dim": 8, "num_attention_heads": 2, "pooled_projection_dim": 10}


def clip(width: int, projection: int = 0) -> torch.nn.Module:
  config = CLIP | {"hidden_size": width, "projection_dim": projection or width}
  kind = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
  return getattr(transformers, kind)(transformers.CLIPTextConfig(**config))


def t5_tokenizer() -> transformers.PreTrainedTokenizerFast:
  words = ["a", "the", "cat", "dog", "on", "mat", *"abcdeghmnost"]
  words = [*dict.fromkeys([f"\u2581{w}" for w in words[:6]] + words[6:])]
  pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -3.0)]
  pieces += [(w, -1.0 - k / 9) for k, w in enumerate(words)]
  model = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
  model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  model.post_processor = tokenizers.processors.TemplateProcessing(
    single="$A </s>", special_tokens=[("</s>", 1)]
  )
  return transformers.T5TokenizerFast(
    tokenizer_object=model, eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
    model_max_length=512, extra_ids=0,
  )  # fmt: skip


def randomize(net: torch.nn.Module) -> torch.nn.Module:
  for p in net.parameters():
    p.data = (p.data + 0.3 * torch.randn_like(p) / max(p.shape[-1], 4) ** 0.5).half()
  return net.eval().float()


def save(pipe, folder: pathlib.Path, parts: dict) -> None:
  shutil.rmtree(folder, ignore_errors=True)
  pipe.save_pretrained(folder)
  for name, part in parts.items():
    if isinstance(part, torch.nn.Module):
      shutil.rmtree(folder / name)
      part.half().save_pretrained(folder / name, variant="fp16")
      part.float()


def main() -> None:
  torch.manual_seed(0)
  vocabulary = FIXTURES / "tiny-sd2" / "tokenizer"
  clip_tokenizer = transformers.CLIPTokenizer.from_pretrained(vocabulary)
  schedule = diffusers.FlowMatchEulerDiscreteScheduler
  sd3 = {
    "transformer": diffusers.SD3Transformer2DModel(
      **NET, sample_size=8, in_channels=16, out_channels=16, joint_attention_dim=20,
      caption_projection_dim=16, pos_embed_max_size=6, num_layers=2,
      qk_norm="rms_norm", dual_attention_layers=(0,),
    ),
    "vae": diffusers.AutoencoderKL(**VAE, latent_channels=16),
    "text_encoder": clip(8, 6),
    "text_encoder_2": clip(10, 4),
    "text_encoder_3": transformers.T5EncoderModel(
      transformers.T5Config(**T5, d_model=20)
    ),
  }  # fmt: skip
  flux = {
    "transformer": diffusers.FluxTransformer2DModel(
      **NET, in_channels=16, joint_attention_dim=12, num_layers=1,
      num_single_layers=1, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    ),
    "vae": diffusers.AutoencoderKL(**VAE, latent_channels=4),
    "text_encoder": clip(10),
    "text_encoder_2": transformers.T5EncoderModel(
      transformers.T5Config(**T5, d_model=12)
    ),
  }  # fmt: skip
  for parts in (sd3, flux):
    for part in parts.values():
      randomize(part)
  sd3 |= {"tokenizer": clip_tokenizer, "tokenizer_2": clip_tokenizer}
  sd3 |= {"tokenizer_3": t5_tokenizer(), "scheduler": schedule(shift=3.0)}
  flux |= {"tokenizer": clip_tokenizer, "tokenizer_2": t5_tokenizer()}
  flux["scheduler"] = schedule(
    shift=3.0, use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64
  )
  about = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "steps": 10}
  for name, kind, parts, channels, options in (
    ("tiny-sd3", diffusers.StableDiffusion3Pipeline, sd3, 16,
     {"guidance_scale": 5.0, "negative_prompt": NEGATIVE}),
    ("tiny-flux", diffusers.FluxPipeline, flux, 4, {"guidance_scale": 3.5}),
    ("tiny-flux", diffusers.FluxPipeline, flux, 4,
     {"guidance_scale": 3.5, "negative_prompt": NEGATIVE, "true_cfg_scale": 2.0}),
  ):  # fmt: skip
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    h, w = (8, 8) if name == "tiny-sd3" else (8, 12)
    x = torch.randn(1, channels, h, w)
    given = x if name == "tiny-sd3" else pipe._pack_latents(x, 1, channels, h, w)
    size = {"height": 2 * h, "width": 2 * w, "num_inference_steps": 10}
    out = pipe(PROMPT, latents=given, output_type="latent", **size, **options).images
    image = pipe(PROMPT, latents=given, output_type="np", **size, **options).images
    if name == "tiny-flux":
      out = pipe._unpack_latents(out, 2 * h, 2 * w, 2)
    save(pipe, FIXTURES / name, parts) if "true_cfg_scale" not in options else None
    file = "expected_cfg.npz" if "true_cfg_scale" in options else "expected.npz"
    meta = json.dumps(about | options)
    arrays = {"latents_in": x, "latents_out": out, "image": image}
    tokens = {
      k: v(
        [PROMPT], padding="max_length", max_length=12, truncation=True
      ).input_ids
      for k, v in parts.items()
      if k.startswith("tokenizer")
    }  # fmt: skip
    np.savez_compressed(FIXTURES / name / file, meta=meta, **arrays, **tokens)
    print(name, tokens, float(out.abs().max()))


if __name__ == "__main__":
  with torch.no_grad():
    main()
