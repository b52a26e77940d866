"""The kernel compiled for absent TPUs, by the libtpu of `.[test,tpu]`."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="needs libtpu, the compiler for TPUs: pip install -e '.[test,tpu]'",
)
# libtpu looks for a TPU and its neighbors unless told not to.
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TF_CPP_MIN_LOG_LEVEL": "2",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "XLA_FLAGS": "",
}
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from sdiff_jax.distributed import sharding
from sdiff_jax.kernels.attention import attention

chip, L, dtype, work, chips, batch, heads, size = json.loads(sys.argv[1])
devices = topologies.get_topology_desc(platform="tpu", topology_name=chip).devices
mesh = Mesh(
  np.array(devices[:chips]).reshape(min(chips, 2), -1),
  ("a", "b"),
  axis_types=(AxisType.Auto,) * 2,
)
spec = P("a", None, "b")
x = jax.ShapeDtypeStruct(
  (batch, L, heads, size), dtype, sharding=NamedSharding(mesh, spec)
)

def call(*qkv):
  return attention(*qkv, impl="fused")

def jvp(*args):
  return jax.jvp(call, args[:3], args[3:])

def scm(*args):
  def loss(*qkv):
    o, do = jvp(*qkv, *args[3:])
    return jnp.sum(jnp.square(o - jax.lax.stop_gradient(o - do)).astype(jnp.float32))
  return jax.grad(loss, (0, 1, 2))(*args[:3])

def mapped(*args):
  return jax.shard_map(jvp, mesh=mesh, in_specs=(spec,) * 6, out_specs=spec)(*args)

works = {"jvp": jvp, "scm": scm, "shard_map": mapped}
program = jax.jit(sharding.with_mesh(mesh, works[work])).lower(*[x] * 6).compile()
text = program.as_text()
print(json.dumps({
  "temporaries": program.memory_analysis().temp_size_in_bytes / 1e6,
  "flops": program.cost_analysis()["flops"],
  "kernels": text.count('custom_call_target="tpu_custom_call"'),
  "gathers": text.count("all-gather(") + text.count("all-to-all("),
}))
"""


def compiled(
  chip="v5e:2x2", L=4096, dtype="bfloat16", work="jvp", chips=1, shape=(1, 8, 64)
) -> dict:
  """Returns what libtpu says of a program; a process of its own has the settings."""
  chosen = json.dumps([chip, L, dtype, work, chips, *shape])
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, chosen],
    env=os.environ | ENVIRONMENT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


def test_one_pass_in_little_memory():
  """Plain attention's jvp has 1,074 MB of temporaries there, and as many FLOPs."""
  found = compiled()
  assert found["kernels"] == 1
  assert found["temporaries"] <= 1074 / 20
  matrices = 6 * 2 * 8 * 4096**2 * 64
  assert matrices <= found["flops"] <= 1.01 * matrices


@pytest.mark.slow
@pytest.mark.parametrize("work", ["jvp", "scm"])
def test_long_sequences_fit(work):
  """Where plain attention has 16.1 GB of temporaries and the chip 15.75."""
  assert compiled(L=16384, work=work)["temporaries"] <= 200


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize(("work", "kernels"), [("jvp", 1), ("scm", 3)])
def test_every_chip(chip, work, kernels):
  found = compiled(chip, work=work)
  assert (found["kernels"], found["temporaries"] <= 1074 / 20) == (kernels, True)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("L", "dtype", "size"), [(1000, "float32", 72), (77, "bfloat16", 40)]
)
def test_what_does_not_fill_a_block(L, dtype, size):
  assert compiled(L=L, dtype=dtype, shape=(1, 8, size))["kernels"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("work", ["jvp", "scm", "shard_map"])
def test_batch_and_heads_on_four_chips(work):
  """No array moves between chips, under shard_map or by the kernel's own."""
  found = compiled(work=work, chips=4, shape=(2, 8, 64))
  assert (found["kernels"], found["gathers"]) == (3 if work == "scm" else 1, 0)
  assert found["temporaries"] <= 1074 / 20
