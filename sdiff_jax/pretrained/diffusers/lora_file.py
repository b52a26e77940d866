"""Adapters (LoRA) in the layout of peft and diffusers.

A file has two tensors for a weight, "unet.mid_block....to_q.lora_A.weight" [r, in] and
".lora_B.weight" [out, r], by which the weight becomes W + (alpha / r) B A.
"""

import jax
import numpy as np

from sdiff_jax.io import bounded, records
from sdiff_jax.models.layers.lora import A, B
from sdiff_jax.pretrained.diffusers import networks
from sdiff_jax.pretrained.files import safetensors_file, state_dict, to_tensors
from sdiff_jax.types import Json, Params, UserError

FILE = "pytorch_lora_weights.safetensors"
ENDS = {A: ".lora_A.weight", B: ".lora_B.weight"}
OLD_ENDS = {".lora.down.weight": ENDS[A], ".lora.up.weight": ENDS[B]}
ALPHA = ".alpha"
METADATA = "lora_adapter_metadata"  # in the header
UNSUPPORTED = ("alpha_pattern", "use_dora", "use_rslora")


def save(path: str, adapters: Params, *, part: str, scale: float) -> None:
  """Writes adapters to a file, with alpha = rank.

  The factor is in B, so that no reader needs alpha, which not all of them look for.

  Args:
    path: of the file.
    adapters: of the network, see `models.layers.lora.init`.
    part: name of its folder, "unet" or "transformer".
    scale: alpha / rank of the adapters.

  Raises:
    ValueError: a weight has three axes, which no network of diffusers has.
  """
  tensors = {}
  for where, x in jax.tree.leaves_with_path(adapters):
    *keys, name, kind = (k.key for k in where)
    pair = adapters
    for k in (*keys, name):
      pair = pair[k]
    rows = pair[A].ndim
    x = np.asarray(x) * (np.float32(scale) if kind == B else np.float32(1))
    if x.ndim != 2 and (kind == B or rows == 3):
      raise ValueError(f"adapters: {name} of {'.'.join(keys)} is no matrix")
    tensor = to_tensors.from_params({name: x}, "".join)[name]
    if kind == B and rows > 2:
      tensor = tensor[..., None, None]
    tensors[_name(part, (*keys, name), kind)] = tensor
  safetensors_file.write(path, tensors, {"format": "pt"})


def load(path: str, net: Params, *, part: str) -> Params:
  """Returns the adapters of a file, whose factor alpha / rank is in B.

  Args:
    path: of the file.
    net: parameters of the network, or their shapes.
    part: name of its folder, "unet" or "transformer".

  Raises:
    UserError: the file is missing or damaged, or it is of another network.
  """
  tensors = {_present(k): v for k, v in state_dict.read(path).items()}
  alphas = {k: _number(v, path) for k, v in tensors.items() if k.endswith(ALPHA)}
  common = _alpha(path, part)
  like: Params = {}
  factors = {}
  for where, w in jax.tree.leaves_with_path(net):
    keys = tuple(k.key for k in where)
    first = tensors.get(_name(part, keys, A))
    if first is None:
      continue
    inner = like
    for k in keys[:-1]:
      inner = inner.setdefault(k, {})
    rank = max(1, *first.shape[:1])
    inner[keys[-1]] = {
      A: jax.ShapeDtypeStruct((*w.shape[:-1], rank), np.float32),
      B: jax.ShapeDtypeStruct((rank, *w.shape[-1:]), np.float32),
    }
    name = _name(part, keys, B)
    own = alphas.get(f"{name.removesuffix(ENDS[B])}{ALPHA}", common or rank)
    factors[name] = own / rank
  with np.errstate(all="ignore"):  # what is not finite is reported below
    scaled = {
      name: x.astype(np.float32) * np.float32(factors[name])
      if name in factors and x.dtype.kind not in "cSU"
      else x
      for name, x in tensors.items()
      if name not in alphas
    }
  return state_dict.match_params(
    scaled,
    like,
    lambda keys: _name(part, keys[:-1], keys[-1]),
    network=f"the {part}; it is a LoRA of another network",
    path=path,
  )


def _number(x: np.ndarray, path: str) -> float:
  """Returns the value of a tensor with one element."""
  if x.size != 1 or x.dtype.kind not in "fiu":
    raise UserError(f"{path}: an alpha is no number, but {x.dtype} {list(x.shape)}")
  return float(x.reshape(()))


def _present(name: str) -> str:
  """Returns the present name of a tensor of a file."""
  for old, new in OLD_ENDS.items():
    if name.endswith(old):
      return name.removesuffix(old) + new
  return name


def _alpha(path: str, part: str) -> float:
  """Returns the alpha that the header of a file names, 0 for none.

  Raises:
    UserError: it names another kind of adapters.
  """
  if not path.endswith(".safetensors"):
    return 0.0
  with bounded.open_regular(path) as file:
    text = safetensors_file.metadata(file).get(METADATA, "{}")
  config = records.decode(text, dict[str, Json], path, any_number=True)
  for field in UNSUPPORTED:
    if config.get(f"{part}.{field}"):
      raise UserError(f"{path}: {field} is not supported; merge it with peft")
  alpha = config.get(f"{part}.lora_alpha", 0)
  return records.check(alpha, float | int, f"{path}: {part}.lora_alpha")


def _name(part: str, keys: tuple[str, ...], kind: str) -> str:
  """Returns the name of the tensor of a weight with some keys."""
  module = networks.to_state_dict(keys).removesuffix(".weight")
  return f"{part}.{module}{ENDS[kind]}"
