"""Makes tests/fixtures/weights: small files that `pretrained.state_dict` reads.

Run in an environment with PyTorch and safetensors, from the root of the repository:
  python third_party/torch_files.py tests/fixtures/weights

One network of two layers is saved as .pt (zip and the older form), .safetensors, and
a pickle of modules that carry their source, in the shape of EDM's `persistence`:
reduced to a function of the module torch_utils.persistence and a dict with a state.
expected.npz holds its tensors; malicious.pkl would write a file if it were run.
"""

import os
import pickle
import sys
import types

import numpy as np
import torch
from safetensors.torch import save_file


def reconstruct(meta: dict) -> object:
  raise NotImplementedError("only its name is written")


class Carried(torch.nn.Module):
  """A module that is pickled as EDM's are: by the words of its class and a state."""

  def __reduce__(self) -> tuple:
    state = dict(self.__dict__)
    source = "raise RuntimeError('source of a file was run')"
    meta = {"type": "class", "version": 6, "module_src": source}
    return reconstruct, (meta | {"class_name": type(self).__name__, "state": state},)


class Layer(Carried):
  def __init__(self, size: int):
    super().__init__()
    self.weight = torch.nn.Parameter(torch.randn(size, 2, 3, 3))
    self.narrow = torch.nn.Parameter(torch.randn(4, size).half())
    self.register_parameter("bias", None)
    self.register_buffer("resample_filter", torch.ones(1, 1, 2, 2) / 4)
    self.register_buffer("scratch", torch.zeros(3), persistent=False)


class EasyDict(dict):
  pass


class Net(Carried):
  def __init__(self):
    super().__init__()
    self.enc = torch.nn.ModuleDict({"8x8_conv": Layer(2), "8x8_block0": Layer(3)})
    self.transposed = torch.nn.Parameter(torch.randn(3, 2).t())
    self.brain = torch.nn.Parameter(torch.randn(5).bfloat16())
    self.register_buffer("count", torch.tensor(7))
    self.options = EasyDict(noise=np.arange(3.0), kind=torch.float16)


class Malicious:
  def __reduce__(self) -> tuple:
    return os.system, ("touch was_run",)


def pretend(name: str, **members: object) -> None:
  """Makes a module that pickles of the members will name."""
  module = sys.modules[name] = types.ModuleType(name)
  for key, value in members.items():
    value.__module__, value.__qualname__, value.__name__ = name, key, key
    setattr(module, key, value)


def main(folder: str) -> None:
  torch.manual_seed(0)
  pretend("torch_utils")
  pretend("torch_utils.persistence", _reconstruct_persistent_obj=reconstruct)
  pretend("dnnlib")
  pretend("dnnlib.util", EasyDict=EasyDict)
  net = Net().eval().requires_grad_(False)
  tensors = net.state_dict()
  path = folder + "/"
  torch.save(tensors, path + "zip.pt")
  torch.save(
    {"ema": tensors, "step": 3}, path + "old.pt", _use_new_zipfile_serialization=False
  )
  tight = {k: v.contiguous() for k, v in tensors.items()}
  save_file(tight, path + "file.safetensors")
  with open(path + "edm.pkl", "wb") as file:
    pickle.dump({"ema": net, "loss_fn": None, "dataset_kwargs": EasyDict(x=1)}, file)
  with open(path + "malicious.pkl", "wb") as file:
    pickle.dump({"ema": {"weight": torch.ones(2), "more": Malicious()}}, file)
  wide = {
    k: v.float().numpy() if v.is_floating_point() else v.numpy()
    for k, v in tensors.items()
  }
  np.savez(path + "expected.npz", **wide)


if __name__ == "__main__":
  main(*sys.argv[1:])
