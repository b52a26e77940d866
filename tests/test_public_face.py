"""`import sdiff_jax`: what it gives, that it is cheap, and that all of it is documented."""

import inspect
import pkgutil
import subprocess
import sys
import types

import pytest

import sdiff_jax


def functions() -> dict[str, types.FunctionType]:
  """Returns dotted name -> function that users call, of all modules of the face."""
  modules = [getattr(sdiff_jax, name) for name in sdiff_jax.__all__]
  modules = [module for module in modules if inspect.ismodule(module)]
  for package in (sdiff_jax.losses, sdiff_jax.models, sdiff_jax.training):
    for file in pkgutil.iter_modules(package.__path__):
      # The loop takes a run's files; tests/training/test_loop.py shows its use.
      if not file.name.startswith("_") and file.name not in ("layers", "loop"):
        modules.append(getattr(package, file.name))
  found = {}
  for module in modules:
    names = getattr(module, "__all__", vars(module))
    if module.__name__.startswith("sdiff_jax.models."):
      names = ["build"]  # the rest is parts of the network
    for name in names:
      value = getattr(module, name)
      if inspect.isfunction(value) and not name.startswith("_"):
        exported = hasattr(module, "__all__") and value.__module__.startswith("sdiff")
        if exported or value.__module__ == module.__name__:
          found[f"{module.__name__}.{name}"] = value
  return found


FUNCTIONS = functions()


def test_it_is_cheap():
  code = (
    "import sys, sdiff_jax; print(sorted({'jax', 'numpy', 'flax'} & {*sys.modules}))"
  )
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
  assert run.stdout.decode().strip() == "[]"


def test_all_names_are_there():
  assert dir(sdiff_jax) == sorted(sdiff_jax.__all__)
  for name in sdiff_jax.__all__:
    assert getattr(sdiff_jax, name)
    assert name in sdiff_jax.__doc__ or name == "__version__"
  with pytest.raises(AttributeError, match="no attribute 'nothing'"):
    _ = sdiff_jax.nothing


def test_it_covers_the_library():
  assert {"sdiff_jax.samplers.build", "sdiff_jax.samplers.sample"} <= FUNCTIONS.keys()
  assert "sdiff_jax.losses.scm.tangent" in FUNCTIONS
  assert "sdiff_jax.models.mlp.build" in FUNCTIONS
  assert "sdiff_jax.diffusion.trigflow.denoiser" in FUNCTIONS
  assert "sdiff_jax.training.ema.betas" in FUNCTIONS


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_is_documented(name):
  """One sentence, Args where there are some, what is returned, and an example."""
  function = FUNCTIONS[name]
  text = inspect.getdoc(function) or ""
  parameters = inspect.signature(function).parameters
  assert text.split("\n\n")[0].rstrip().endswith((".", ":", ")")), name
  assert not parameters or "Args:" in text, f"{name}: Args are missing"
  for parameter in parameters:
    assert not parameters or f"{parameter}:" in text, f"{name}: {parameter} is missing"
  annotation = inspect.signature(function).return_annotation
  says = ("Returns", "Yields", "Draws", "Raises")
  assert annotation is None or any(word in text for word in says), name
  assert "Example:\n" in text, f"{name}: an example is missing"
  assert ">>> " in text, f"{name}: an example is missing"
