"""Loads program.bin, which lies beside it: needs jax, numpy and flatbuffers alone."""

import json
import mmap
import pathlib

import jax
import jax.export
import numpy as np


def load(folder=pathlib.Path(__file__).parent):
  """Returns the function (seeds [B], **conditions [B, ...]) -> images uint8."""
  program = jax.export.deserialize((folder / "program.bin").read_bytes())
  with open(folder / "params.safetensors", "rb") as file:
    data = np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
  start = 8 + int.from_bytes(data[:8].tobytes(), "little")
  params = json.loads(data[8:start].tobytes())
  for name, like in zip(sorted(params), program.in_avals, strict=False):
    begin, end = (start + k for k in params[name]["data_offsets"])
    params[name] = jax.device_put(data[begin:end].view(like.dtype).reshape(like.shape))
  call = jax.jit(program.call)
  return lambda seeds, **cond: np.asarray(call(params, np.int32(seeds), cond))
