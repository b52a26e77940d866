"""Makes tests/fixtures/vision_features.npz: features of small DINOv2 and CLIP networks.

Run in an environment with PyTorch, transformers, timm and open_clip, from the root of
the repository:
  python third_party/vision_features.py tests/fixtures/vision_features.npz

Weights are those of tests/formula_weights.py, by the names and shapes that are saved;
outputs are computed in float64. Position embeddings of DINOv2 are resized as in its own
code (torch hub): by a scale factor with 0.1 added to the side, without antialias.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import open_clip
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import formula_weights  # noqa: E402

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = (
  (0.48145466, 0.4578275, 0.40821073),
  (0.26862954, 0.26130258, 0.27577711),
)
TOKENS = ROOT / "tests" / "fixtures" / "tiny-sd2" / "tokenizer_expected.json"


def filled(model: torch.nn.Module) -> tuple[torch.nn.Module, dict]:
  """Returns the network with weights by the formula, and their shapes by name."""
  shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
  shapes = {k: v for k, v in shapes.items() if v and "position_ids" not in k}
  tensors = {
    k: torch.from_numpy(formula_weights.transformer(k, v)) for k, v in shapes.items()
  }
  missing, unexpected = model.load_state_dict(tensors, strict=False)
  assert not unexpected, unexpected
  assert set(missing) <= {"logit_scale"}, missing
  return model.double().eval().requires_grad_(False), shapes


def normalize(x: torch.Tensor, constants: tuple) -> torch.Tensor:
  mean, std = (torch.tensor(c).double().reshape(1, 3, 1, 1) for c in constants)
  return (x.double() / 255 - mean) / std


def bicubic(images: np.ndarray) -> torch.Tensor:
  x = torch.from_numpy(images).permute(0, 3, 1, 2).double()
  x = functional.interpolate(x, (224, 224), mode="bicubic", antialias=True)
  return normalize(x, IMAGENET)


def pillow(images: np.ndarray, side: int) -> torch.Tensor:
  """The pixels of CLIP: smaller side to `side`, then the middle."""
  out = []
  for image in map(Image.fromarray, images):
    small = min(image.size)
    size = [n * side // small for n in image.size]
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((n - side) / 2) for n in size)
    out.append(np.asarray(image.crop((left, top, left + side, top + side))))
  return normalize(torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2), OPENAI)


def resized(place: torch.Tensor, side: int) -> torch.Tensor:
  """Position embeddings [1, 1 + n^2, C] for side x side patches."""
  n = round((place.shape[1] - 1) ** 0.5)
  grid = place[:, 1:].reshape(1, n, n, -1).permute(0, 3, 1, 2)
  factor = float((side + 0.1) / n)
  grid = functional.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
  return torch.cat([place[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def hub() -> tuple[torch.nn.Module, dict]:
  """timm's transformer, whose names are those of torch hub's DINOv2."""
  model, shapes = filled(
    timm.models.VisionTransformer(
      img_size=518,
      patch_size=14,
      embed_dim=128,
      depth=2,
      num_heads=2,
      init_values=1.0,
      num_classes=0,
      dynamic_img_size=False,
    )
  )
  model.pos_embed.data = resized(model.pos_embed.data, 16)
  model.patch_embed.img_size = (224, 224)
  return model, shapes


def main(path: str) -> None:
  rng = np.random.default_rng(0)
  low = rng.integers(0, 256, (2, 5, 8, 3), np.uint8)
  small = [Image.fromarray(x).resize((64, 40), Image.Resampling.BICUBIC) for x in low]
  small = np.stack([np.asarray(x) for x in small])
  large = rng.integers(0, 256, (1, 240, 250, 3), np.uint8)
  ids = torch.tensor(json.loads(TOKENS.read_text())["input_ids"])
  out, shapes = {"small": small, "large": large, "ids": ids.numpy()}, {}

  model, shapes["hub"] = hub()
  for name, images in (("small", small), ("large", large)):
    out[f"hub_{name}"] = model(bicubic(images))

  config = transformers.Dinov2Config(
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=518,
    patch_size=14,
    use_swiglu_ffn=True,
  )
  model = transformers.Dinov2Model(config).double().eval()
  # The names of released files, which save_pretrained writes.
  released = pathlib.Path(tempfile.mkdtemp())
  model.save_pretrained(released)
  saved = load_file(released / "model.safetensors")
  shapes["transformers"] = {k: tuple(v.shape) for k, v in saved.items()}
  tensors = {
    k: torch.from_numpy(formula_weights.transformer(k, tuple(v.shape)))
    for k, v in saved.items()
  }
  save_file(tensors, released / "model.safetensors", metadata={"format": "pt"})
  model = transformers.Dinov2Model.from_pretrained(released).double().eval()
  place = model.embeddings.position_embeddings.data
  for name, images in (("small", small), ("large", large)):
    out[f"own_{name}"] = model(bicubic(images)).pooler_output  # another resizing
  model.embeddings.interpolate_pos_encoding = lambda *_: resized(place, 16)
  for name, images in (("small", small), ("large", large)):
    out[f"transformers_{name}"] = model(bicubic(images)).pooler_output

  text = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2}
  text |= {"num_attention_heads": 4, "vocab_size": 63, "max_position_embeddings": 12}
  text |= {"bos_token_id": 0, "eos_token_id": 62, "pad_token_id": 1}
  vision = {"hidden_size": 96, "intermediate_size": 80, "num_hidden_layers": 2}
  vision |= {"num_attention_heads": 3, "image_size": 56, "patch_size": 14}
  config = transformers.CLIPConfig(
    text_config=text, vision_config=vision, projection_dim=24
  )
  model, shapes["clip"] = filled(transformers.CLIPModel(config))
  texts = model.get_text_features(input_ids=ids).pooler_output
  out["clip_text"] = functional.normalize(texts)
  for name, images in (("small", small), ("large", large)):
    made = model.get_image_features(pixel_values=pillow(images, 56)).pooler_output
    out[f"clip_{name}"] = functional.normalize(made)

  model_cfg = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 56, "layers": 2, "width": 96, "head_width": 32}
    | {"mlp_ratio": 4.3637, "patch_size": 14},
    "text_cfg": {"context_length": 12, "vocab_size": 63, "width": 128, "heads": 4}
    | {"layers": 2},
  }
  model, shapes["open_clip"] = filled(open_clip.model.CLIP(**model_cfg))
  out["open_clip_text"] = model.encode_text(ids, normalize=True)
  for name, images in (("small", small), ("large", large)):
    out[f"open_clip_{name}"] = model.encode_image(pillow(images, 56), normalize=True)

  out = {k: np.asarray(v) for k, v in out.items()}
  out = {k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in out.items()}
  meta = {"shapes": shapes, "open_clip_config": {"model_cfg": model_cfg}}
  meta["clip_config"] = config.to_dict()
  meta["versions"] = {
    m.__name__: m.__version__ for m in (torch, transformers, timm, open_clip)
  }
  np.savez_compressed(path, **out, meta=np.array(json.dumps(meta, default=str)))


if __name__ == "__main__":
  with torch.no_grad():
    main(*sys.argv[1:])
