"""Models in a folder of the diffusers format: networks, tokenizer and schedule.

A folder has model_index.json, which names the parts, and a folder for each part with
its config and weights; a model with one network may have all in one folder.
"""

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

from msgspec import Meta

from sdiff_jax.pretrained.diffusers import (
  autoencoder_dc,
  class_labels,
  clip_text,
  dit_checkpoint,
  dit_transformer,
  fit,
  flux_transformer,
  gemma_text,
  hub,
  json_tokenizer,
  pixart_transformer,
  sana_transformer,
  scheduler,
  sd3_transformer,
  t5_text,
  unet2d,
  unet2d_condition,
  vae,
)
from sdiff_jax.pretrained.diffusers import networks as networks_lib
from sdiff_jax.pretrained.diffusers import tokenizer as tokenizer_lib
from sdiff_jax.pretrained.diffusers import weights as weights_lib
from sdiff_jax.pretrained.diffusers.flow_scheduler import FlowSchedule
from sdiff_jax.pretrained.diffusers.model import Model, with_shape
from sdiff_jax.pretrained.diffusers.scheduler import Schedule
from sdiff_jax.pretrained.files import config_fields
from sdiff_jax.pretrained.files.config_fields import Field
from sdiff_jax.types import Json, Params, PyTree, UserError

Class = Annotated[list[str | None], Meta(min_length=2, max_length=2)]
INDEX = {  # model_index.json: part -> [library, class]
  name: Field(None, Class | None)
  for name in (
    *("unet", "transformer", "vae", "scheduler"),
    *(
      f"{kind}{suffix}"
      for kind in ("text_encoder", "tokenizer")
      for suffix in fit.SUFFIXES
    ),
  )
}
NAMES = {  # of config.json: what names the class of the network
  "_class_name": Field(None, str | None),
  "architectures": Field((), list[str] | None),
}
PARTS = (*fit.PREDICTORS, "vae", *fit.ENCODERS)  # with a network
TOKENIZERS = {
  **dict.fromkeys(("CLIPTokenizer", "CLIPTokenizerFast"), "clip"),
  **dict.fromkeys(("T5Tokenizer", "T5TokenizerFast"), "json"),
  **dict.fromkeys(("GemmaTokenizer", "GemmaTokenizerFast"), "json"),
}
PIXART = "PixArtTransformer2DModel"
NETWORKS = {  # class -> module
  "UNet2DConditionModel": unet2d_condition,
  "UNet2DModel": unet2d,
  "SD3Transformer2DModel": sd3_transformer,
  "FluxTransformer2DModel": flux_transformer,
  **dict.fromkeys(dit_transformer.NAMES, dit_transformer),
  PIXART: pixart_transformer,
  "SanaTransformer2DModel": sana_transformer,
  "AutoencoderKL": vae,
  "AutoencoderDC": autoencoder_dc,
  "CLIPTextModel": clip_text,
  "CLIPTextModelWithProjection": clip_text,
  "T5EncoderModel": t5_text,
  "Gemma2Model": gemma_text,
}
CLASSES = {f"tokenizer{suffix}": tuple(TOKENIZERS) for suffix in fit.SUFFIXES}
CLASSES["scheduler"] = scheduler.NAMES


def load(
  path: str,
  *,
  dtype: str = "float32",
  remat: str = "",
  place: Callable[[Params], PyTree] | None = None,
) -> Model:
  """Returns the model of a folder, with its weights.

  Args:
    path: of the folder; hf://organization/name is downloaded from the Hugging Face Hub.
      Or a checkpoint of DiT or of SiT, whose model has no autoencoder.
    dtype: of the hidden layers and of the weights.
    remat: what a block recomputes in the backward pass: "" nothing, "weights" what it
      gathers from other devices, "dots" everything
      but matrix products and convolutions, "full" everything.
    place: shapes of the parameters of a part -> their shardings, and every tensor goes to
      its devices as soon as it is read; None for weights on the host.

  Raises:
    UserError: a file is missing or damaged; or lists unknown fields, unsupported values,
      and weights that are missing or left over, of all parts.
  """
  if os.path.isfile(path):
    return dit_checkpoint.load(path, dtype=dtype, remat=remat, place=place)
  folder = hub.local(path)
  classes = _classes(folder)
  parts = [name for name in PARTS if name in classes]
  problems, networks, params = [], {}, {}
  for name in parts:
    try:
      networks[name] = network(_part(folder, name), dtype=dtype, remat=remat)
    except UserError as error:
      problems.append(str(error))
  try:
    process = schedule(_part(folder, "scheduler"), classes["scheduler"])
  except UserError as error:
    problems.append(str(error))
  for name in [] if problems else parts:
    try:
      params[name] = weights_lib.parameters(
        _part(folder, name), networks[name], dtype=dtype, place=place
      )
    except UserError as error:
      problems.append(str(error))
  problems = fit.misfits(networks) + problems
  if problems:
    raise UserError(fit.listed(folder, problems))
  model = _model(networks, params, process)
  return model._replace(
    labels=class_labels.names(os.path.join(folder, "model_index.json")),
    tokenizers=tokenizers(folder, model),
    force_zeros_for_empty_prompt=_forces_zeros(folder),
  )


def _model(
  networks: dict[str, Any], params: dict[str, Params], process: Schedule | FlowSchedule
) -> Model:
  """Returns a model without tokenizers."""
  name = next(name for name in fit.PREDICTORS if name in networks)
  unet = networks[name]
  params = {"unet" if k == name else k: v for k, v in params.items()}
  encoders = {k: v for k, v in networks.items() if k in fit.ENCODERS}
  if isinstance(process, FlowSchedule):
    process = process._replace(spacing=unet.spacing or process.spacing)
  model = Model(unet, networks.get("vae"), encoders, params, {}, process)
  return with_shape(model, unet.shape)


def tokenizers(folder: str, model: Model) -> dict[str, tokenizer_lib.Tokenizer]:
  """Returns the tokenizers of a folder, by the names of their text encoders.

  Args:
    folder: of the model.
    model: with its text encoders.

  Raises:
    UserError: one is missing or damaged, or does not fit its text encoder.
  """
  classes, found = _classes(folder), {}
  for suffix in fit.SUFFIXES:
    name, part = f"text_encoder{suffix}", f"tokenizer{suffix}"
    if part not in classes or (suffix and name not in model.text_encoders):
      continue
    where, encoder = _part(folder, part), model.text_encoders.get(name)
    if TOKENIZERS[classes[part]] == "json":
      length, lower = model.unet.long_text or 512, model.unet.masked
      found[name] = json_tokenizer.load(where, length, lower=lower)
    elif encoder is None or encoder.length is None:
      found[name] = tokenizer_lib.load(where)
    else:
      found[name] = tokenizer_lib.load(where, encoder.length)
    _check_tokenizer(where, found[name], encoder)
  missing = [name for name in model.text_encoders if name not in found]
  if missing and len(model.text_encoders) > 1:
    raise UserError(f"{folder}: model_index.json names no tokenizer of {missing[0]}")
  return found


def configs(path: str) -> dict[str, dict[str, Json]]:
  """Returns the contents of the config files of a folder, for `abstract`.

  Raises:
    UserError: a file is missing or damaged.
  """
  folder = hub.local(path, weights=False)
  classes = _classes(folder)
  files = dict.fromkeys(PARTS, "config.json") | {"scheduler": "scheduler_config.json"}
  return {
    name: config_fields.read_config(os.path.join(_part(folder, name), file))
    for name, file in files.items()
    if classes.get(name)
  }


def abstract(
  configs: dict[str, dict[str, Json]], *, dtype: str = "float32", remat: str = ""
) -> Model:
  """Returns the model of its config files, with abstract weights.

  Args:
    configs: contents of config.json for "unet" or "transformer", and optionally "vae"
      and text encoders; of scheduler_config.json for "scheduler".
    dtype: of the hidden layers and of the weights.
    remat: as in `load`.

  Raises:
    UserError: a config is not supported.
  """
  networks = {
    name: _network_from_config(configs[name], name, dtype=dtype, remat=remat)
    for name in PARTS
    if name in configs
  }
  params = {
    k: networks_lib.abstract_params(n.init, dtype=dtype) for k, n in networks.items()
  }
  try:
    schedule = scheduler.from_config(configs["scheduler"])
  except ValueError as error:
    raise UserError(f"scheduler: {error}") from error
  return _model(networks, params, schedule)


def autoencoder(path: str, *, dtype: str = "float32") -> tuple[vae.Autoencoder, Params]:
  """Returns the autoencoder of a folder, or of its subfolder vae, and its weights.

  Args:
    path: of the folder, or hf://organization/name.
    dtype: of the hidden layers and of the weights.

  Raises:
    UserError: a file is missing or damaged, or the network is no autoencoder.
  """
  folder = _part(hub.local(path), "vae")
  coder = network(folder, dtype=dtype)
  if not isinstance(coder, vae.Autoencoder):
    raise UserError(f"{folder}: holds no AutoencoderKL or AutoencoderDC")
  return coder, weights_lib.parameters(folder, coder, dtype=dtype)


def network(folder: str, *, dtype: str = "float32", remat: str = "") -> Any:
  """Returns the network of the config.json of a folder, without its weights.

  Returns:
    Result of `from_config` of the module of its class (see NETWORKS).

  Raises:
    UserError: the file is missing or damaged, or does not fit.
  """
  path = os.path.join(folder, "config.json")
  return _network_from_config(
    config_fields.read_config(path), path, dtype=dtype, remat=remat
  )


def _network_from_config(
  config: dict[str, Json], path: str, *, dtype: str, remat: str
) -> Any:
  """Returns the network of a config; messages of errors start with `path`."""
  try:
    names = config_fields.validated_config(
      {name: config[name] for name in NAMES if name in config}, NAMES, {}
    )
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error
  names = [names["_class_name"], *(names["architectures"] or ())]
  if config.get("norm_type") == pixart_transformer.NORM_TYPE:  # of both names
    names = [PIXART if name in dit_transformer.NAMES else name for name in names]
  modules = [NETWORKS[name] for name in names if name in NETWORKS]
  if not modules:
    raise UserError(
      f"{path}: {config_fields.quoted(names)} is none of {', '.join(NETWORKS)}"
    )
  try:
    return modules[0].from_config(config, dtype=dtype, remat=remat)
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error


def _classes(folder: str) -> dict[str, str]:
  """Returns the class of each part that model_index.json names.

  Raises:
    UserError: the file is missing or damaged, or names no network or no scheduler.
  """
  path = os.path.join(folder, "model_index.json")
  index = config_fields.read_config(path)
  predictors = [name for name in fit.PREDICTORS if isinstance(index.get(name), list)]
  if not predictors or not isinstance(index.get("scheduler"), list):
    raise UserError(f"{path}: names no unet and no transformer, or no scheduler")
  try:
    parts = config_fields.validated_config(
      {name: index[name] for name in INDEX if name in index}, INDEX, {}
    )
    classes = {name: part[1] for name, part in parts.items() if part and part[1]}
    for name in (predictors[0], "scheduler"):
      if name not in classes:
        raise ValueError(f"{name}={index[name]}: must name a class")
    for name, class_name in classes.items():
      known = CLASSES.get(name, NETWORKS)
      if class_name not in known:
        raise ValueError(
          f"{name}: {config_fields.quoted(class_name, str)} is none of {', '.join(known)}"
        )
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error
  return classes


def _forces_zeros(folder: str) -> bool:
  """Returns whether a folder of Stable Diffusion XL takes zeros for an empty prompt."""
  path, name = os.path.join(folder, "model_index.json"), "force_zeros_for_empty_prompt"
  index = config_fields.read_config(path)
  try:
    return config_fields.validated_config(
      {name: index[name]} if name in index else {}, {name: Field(False, bool)}, {}
    )[name]
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error


def schedule(folder: str, class_name: str = "") -> Schedule | FlowSchedule:
  """Returns the process of the scheduler_config.json of a folder.

  Args:
    folder: of the part.
    class_name: that model_index.json names; if the file names another one, that of the
      file is used and stderr says so.

  Raises:
    UserError: the file is missing or damaged, or does not fit.
  """
  path = os.path.join(folder, "scheduler_config.json")
  try:
    config = config_fields.read_config(path)
    process = scheduler.from_config(config)
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error
  if class_name not in ("", config["_class_name"]):
    print(
      f"{path}: uses its _class_name={config['_class_name']}; model_index.json names "
      f"{class_name}",
      file=sys.stderr,
    )
  return process


def _check_tokenizer(
  folder: str,
  tokenizer: tokenizer_lib.Tokenizer,
  encoder: clip_text.TextEncoder | None,
) -> None:
  """Raises a UserError unless a tokenizer fits the encoder of its tokens."""
  if encoder is None:
    return
  if tokenizer.size > encoder.vocabulary or tokenizer.last >= encoder.vocabulary:
    raise UserError(
      f"{folder} has {max(tokenizer.size, tokenizer.last + 1)} tokens, the text encoder "
      f"{encoder.vocabulary}: they do not belong together"
    )


def _part(folder: str, name: str) -> str:
  """Returns the subfolder of a part, or the folder itself if there is none."""
  part = os.path.join(folder, name)
  return part if os.path.isdir(part) else folder
