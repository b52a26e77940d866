"""A model of several networks in the diffusers format."""

import types
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from sdiff_jax.pretrained.diffusers import block_loop, clip_text, fit, vae
from sdiff_jax.pretrained.diffusers import tokenizer as tokenizer_lib
from sdiff_jax.pretrained.diffusers.flow_schedule import FlowSchedule
from sdiff_jax.pretrained.diffusers.networks import Predictor
from sdiff_jax.pretrained.diffusers.scheduler import Schedule
from sdiff_jax.types import Array, Cond, Params


class Model(NamedTuple):
  """The parts of a folder; None for a missing part.

  Attributes:
    unet: predicts the noise, v, x0 or a velocity: a U-Net or a transformer.
    vae: decodes latents to images.
    text_encoders: map tokens to what the network's conditions are made of, by the names
      of their folders.
    params: of the networks, by the names of their folders; those of a transformer are
      under "unet", too.
    tokenizers: map texts to tokens, by the names of their text encoders.
    schedule: the diffusion process of the network, and its solver.
    force_zeros_for_empty_prompt: whether zeros are the conditions without text.
    labels: the class of each name of a class.
    instructed: tokenizers of prompts with an instruction before them, by the names of
      their text encoders; a negative prompt has none.
  """

  unet: Predictor
  vae: vae.Autoencoder | None
  text_encoders: dict[str, clip_text.TextEncoder]
  params: dict[str, Params]
  tokenizers: dict[str, tokenizer_lib.Tokenizer]
  schedule: Schedule | FlowSchedule
  force_zeros_for_empty_prompt: bool = False
  labels: Mapping[str, int] = types.MappingProxyType({})
  instructed: Mapping[str, tokenizer_lib.Tokenizer] = types.MappingProxyType({})

  @property
  def text_encoder(self) -> clip_text.TextEncoder | None:
    """The first text encoder."""
    return self.text_encoders.get(fit.ENCODERS[0])

  @property
  def tokenizer(self) -> tokenizer_lib.Tokenizer | None:
    """The tokenizer of the first text encoder."""
    return self.tokenizers.get(fit.ENCODERS[0])

  @property
  def size(self) -> tuple[int, int]:
    """Height and width of images, in pixels."""
    factor = self.vae.factor if self.vae else 1
    return self.unet.shape[0] * factor, self.unet.shape[1] * factor

  @property
  def lengths(self) -> dict[str, int]:
    """The number of tokens of every prompt, by the names of the text encoders."""
    own = {name: tokenizer.length for name, tokenizer in self.instructed.items()}
    return self.negative_lengths | own

  @property
  def negative_lengths(self) -> dict[str, int]:
    """The number of tokens of a negative prompt."""
    return {
      name: self.tokenizers[name].length
      if name in self.tokenizers
      else encoder.length or self.unet.long_text
      for name, encoder in self.text_encoders.items()
    }

  def encode(self, params: dict[str, Params], tokens: Mapping[str, Array]) -> Cond:
    """Returns the conditions that texts are, and the sizes of images.

    Args:
      params: of the model.
      tokens: ids int32 [B, L], by the names of the text encoders.
    """
    texts = {
      name: fit.text(self.unet, encoder, params[name], tokens[name])
      for name, encoder in self.text_encoders.items()
    }
    cond = self.unet.conditions(texts)
    if not self.unet.sized:
      return cond
    height, width = self.size
    ids = jnp.asarray([height, width, 0, 0, height, width], jnp.float32)
    return cond | {
      "time_ids": jnp.broadcast_to(ids[None], (len(cond["text"]), len(ids)))
    }


def stacked(model: Model, params: dict[str, Params]) -> dict[str, Params]:
  """Returns the parameters of a model with alike blocks in stacks, see `block_loop`.

  Args:
    model: with its networks.
    params: of the model, or their shapes.
  """
  networks = {"unet": model.unet} | model.text_encoders
  return {
    name: block_loop.stacked(x, networks[name].lists) if name in networks else x
    for name, x in params.items()
  }


def with_shape(model: Model, shape: tuple[int, int, int]) -> Model:
  """Returns a model that makes samples of another shape.

  Args:
    model: with any shape.
    shape: (H, W, C) of the samples, latents for a model with an autoencoder.
  """
  unet, process = model.unet._replace(shape=shape), model.schedule
  if isinstance(process, FlowSchedule):
    process = process._replace(tokens=shape[0] * shape[1] // unet.patch**2)
  return model._replace(unet=unet, schedule=process)


def with_instruction(model: Model, text: str) -> Model:
  """Returns a model whose prompts stand behind an instruction, as those of SANA.

  Args:
    model: with tokenizers.
    text: of the instruction.

  Raises:
    ValueError: no tokenizer takes one.
  """
  instructed = {
    name: tokenizer.instructed(text)
    for name, tokenizer in model.tokenizers.items()
    if tokenizer.instructed is not None
  }
  if not instructed:
    raise ValueError(
      "instruction: only for a network such as SANA, which leaves padding out"
    )
  return model._replace(instructed=instructed)
