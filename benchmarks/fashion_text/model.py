"""Fashion-MNIST with captions, and a text-to-image model of random weights to be trained.

The captions name the class of each image. The model is a folder in the diffusers format:
a U-Net of 28 x 28 pixels with attention to the text, a small CLIP text encoder, a
tokenizer of the words of the captions, and a scheduler; there is no autoencoder.
"""

import io
import itertools
import json
import pathlib
import tarfile

import jax
import numpy as np
from PIL import Image

from sdiff_jax.data import idx
from sdiff_jax.pretrained.diffusers import clip_text, saving, unet2d_condition

NAMES = ("t-shirt", "pair of trousers", "pullover", "dress", "coat", "sandal", "shirt")
NAMES += ("sneaker", "bag", "ankle boot")
FORMS = ("{}", "a {}", "a photo of a {}", "a gray {}")
START, END = "<|startoftext|>", "<|endoftext|>"
TOKENS = 10  # of a text, with start and end
WIDTH = 32  # of the text encoder

UNET = {
  "_class_name": "UNet2DConditionModel",
  "sample_size": 28,
  "in_channels": 1,
  "out_channels": 1,
  "layers_per_block": 1,
  "block_out_channels": [16, 32, 48],
  "down_block_types": ["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
  "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
  "attention_head_dim": [2, 2, 3],
  "cross_attention_dim": WIDTH,
  "norm_num_groups": 8,
  "use_linear_projection": True,
}
SCHEDULER = {
  "_class_name": "DDIMScheduler",
  "num_train_timesteps": 1000,
  "beta_start": 0.00085,
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "prediction_type": "v_prediction",
  "clip_sample": False,
  "set_alpha_to_one": False,
  "timestep_spacing": "trailing",
}


def write_images(folder: pathlib.Path, num: int) -> None:
  """Writes the first training images and a caption of each as one WebDataset tar."""
  source, rng = idx.build(), np.random.default_rng(0)
  folder.mkdir(parents=True, exist_ok=True)
  partial = folder / "train.partial"
  with tarfile.open(partial, "w") as tar:
    for k in range(num):
      image, cond = source[np.array([k])]
      file = io.BytesIO()
      Image.fromarray(image[0, ..., 0]).save(file, "PNG")
      form = FORMS[rng.integers(len(FORMS))]
      _add(tar, f"{k:05d}.png", file.getvalue())
      _add(tar, f"{k:05d}.txt", form.format(NAMES[cond["label"][0]]).encode())
  partial.rename(folder / "train.tar")


def write_model(folder: pathlib.Path) -> None:
  """Writes the model with random weights in the diffusers format."""
  vocabulary, merges = _byte_pairs()
  tokenizer = folder.with_name(f"{folder.name}_tokenizer")
  tokenizer.mkdir(parents=True, exist_ok=True)
  special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
  files = {
    "vocab.json": json.dumps({w: k for k, w in enumerate(vocabulary)}),
    "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges),
    "special_tokens_map.json": json.dumps(special),
    "tokenizer_config.json": json.dumps(
      special | {"model_max_length": TOKENS, "tokenizer_class": "CLIPTokenizer"}
    ),
  }
  for name, text in files.items():
    (tokenizer / name).write_text(text, "utf-8")
  text_encoder = _text_encoder(len(vocabulary))
  key_unet, key_text = jax.random.split(jax.random.key(0))
  unet = unet2d_condition.from_config(UNET).init(key_unet)
  text = clip_text.from_config(text_encoder).init(key_text)
  parts = {
    "unet": saving.network(UNET, unet),
    "text_encoder": saving.network(text_encoder, text),
    "tokenizer": saving.Part("transformers", "CLIPTokenizer", str(tokenizer)),
    "scheduler": saving.scheduler(SCHEDULER),
  }
  saving.save(str(folder), {"_class_name": "StableDiffusionPipeline"}, parts)


def _text_encoder(size: int) -> dict:
  """Returns the config.json of a CLIP text encoder for a vocabulary of a size."""
  return {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": TOKENS,
    "vocab_size": size,
    "hidden_act": "quick_gelu",
    "projection_dim": WIDTH,
    "bos_token_id": size - 2,
    "eos_token_id": size - 1,
    "pad_token_id": size - 1,
    "layer_norm_eps": 1e-5,
  }


def _byte_pairs() -> tuple[list[str], list[tuple[str, str]]]:
  """Returns the vocabulary and the merges by which each word is one token."""
  texts = (text.replace("{}", "").replace("-", " - ") for text in (*FORMS, *NAMES))
  words = sorted({word for text in texts for word in text.split()})
  merges: list[tuple[str, str]] = []
  for word in words:
    while len(parts := _merged(word, merges)) > 1:
      merges.append((parts[0], parts[1]))
  letters = _letters()
  vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
  vocabulary += dict.fromkeys(a + b for a, b in merges if a + b not in vocabulary)
  return [*vocabulary, START, END], merges


def _merged(word: str, merges: list[tuple[str, str]]) -> list[str]:
  """Returns the tokens of a word: the first merge that fits is made, until none does."""
  parts = [*word[:-1], f"{word[-1]}</w>"]
  while pairs := {*itertools.pairwise(parts)} & {*merges}:
    pair = min(pairs, key=merges.index)
    k = next(k for k in range(len(parts)) if (*parts[k : k + 2],) == pair)
    parts[k : k + 2] = ["".join(pair)]
  return parts


def _letters() -> list[str]:
  """Returns the character that stands for each byte in GPT-2's and CLIP's vocabularies."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  stand_ins = {byte: chr(256 + k) for k, byte in enumerate(others)}
  return [stand_ins.get(byte, chr(byte)) for byte in (*printable, *others)]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
  info = tarfile.TarInfo(name)
  info.size = len(data)
  tar.addfile(info, io.BytesIO(data))
