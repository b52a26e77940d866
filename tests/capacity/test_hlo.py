"""Collectives: of programs whose traffic is known, and of text in every spelling."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sdiff_jax.capacity import hlo
from sdiff_jax.distributed import sharding

LINE = "\n\nENTRY %main (x: f32[8]) -> f32[8] {\n  ROOT %y = {}\n}\n"


def spelled(operation: str) -> list[hlo.Collective]:
  return hlo.read("HloModule m, num_partitions=16" + LINE.replace("{}", operation, 1))


def test_a_gather_and_a_scatter_in_a_loop():
  mesh = sharding.make_mesh(2, 4, 1)

  def body(w, x):
    def turn(sums, row):
      y = row @ jax.lax.all_gather(w.astype(jnp.bfloat16), "fsdp", tiled=True)
      part = jax.lax.psum_scatter(row.T @ y, "fsdp", tiled=True)
      return sums + part.astype(jnp.float32), None

    sums, _ = jax.lax.scan(turn, jnp.zeros_like(w), x.astype(jnp.bfloat16))
    return jax.lax.psum(sums, "data")

  spread = P(None, ("data", "fsdp"))
  call = jax.shard_map(
    body, mesh=mesh, in_specs=(P("fsdp"), spread), out_specs=P("fsdp"), check_vma=False
  )
  w, x = (
    jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, p))
    for s, p in (((64, 64), P("fsdp")), ((5, 16, 64), spread))
  )
  text = jax.jit(call).lower(w, x).compile().as_text()
  found = {c.kind: c for c in hlo.read(text)}
  whole = 64 * 64
  scatter = found["reduce-scatter"]
  assert scatter[3:] == (4, 5, True, False)
  wide = 4 if scatter.dtype == "f32" else 2
  assert scatter.bytes == wide * whole
  assert scatter.ring_bytes == wide * whole * 3 / 4
  assert found["all-gather"].ring_bytes == found["all-gather"].bytes * 3 / 4
  assert found["all-reduce"][:4] == ("all-reduce", "f32", whole, 2)
  assert found["all-reduce"].ring_bytes == whole
  name = ("reduce-scatter", scatter.dtype)
  total = hlo.total(hlo.read(text))
  assert total[name] == (5, 5 * scatter.bytes, 5 * scatter.ring_bytes)


@pytest.mark.parametrize(
  ("groups", "size"),
  [
    ("{{0,1,2,3},{4,5,6,7}}", 4),
    ("[2,8]<=[16]", 8),
    ("[8,2]<=[2,8]T(1,0)", 2),
    ("mesh['axis_0'=2,'axis_1'=8] {'axis_1'}", 8),
    ("mesh['axis_0'=2,'axis_1'=8] {'axis_0','axis_1'}", 16),
    ("{}", 16),
  ],
)
def test_groups_in_every_spelling(groups, size):
  (one,) = spelled(f"f32[8]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%a")
  assert one == ("all-reduce", "f32", 32, size, 1, False, False)


@pytest.mark.parametrize(
  ("operation", "expected"),
  [
    ("(bf16[2,8]{1,0:T(8,128)(2,1)}, pred[4]) all-reduce", {"bf16": 32, "pred": 4}),
    ("(f32[2], f32[32]) all-gather-start", {"f32": 128}),
    ("((f32[2], f8e4m3fn[3]), (f32[4], f8e4m3fn[6])) all-gather-start",
     {"f32": 16, "f8e4m3fn": 6}),
    ("(f32[8], f32[8], u32[], u32[]) collective-permute-start", {"f32": 32}),
    ("f32[4]{0} reduce-scatter", {"f32": 64}),
    ("f32[4]{0} all-gather-done", {}),
    ("f32[4]{0} fusion", {}),
  ],
)  # fmt: skip
def test_bytes_in_every_spelling(operation, expected):
  found = spelled(f"{operation}(%x), replica_groups=[4,4]<=[16]")
  assert {c.dtype: c.bytes for c in found} == expected


def test_what_a_tpu_disguises():
  text = """HloModule m, num_partitions=4

%all-reduce-scatter (input: bf16[16]) -> bf16[4] {
  %all-reduce.1 = bf16[16]{0} all-reduce(%input), replica_groups={{0,1,2,3}}
  ROOT %s = bf16[4]{0} dynamic-slice(%all-reduce.1, %i), dynamic_slice_sizes={4}
}

%start (x: bf16[4]) -> bf16[16] {
  ROOT %g = bf16[16]{0} all-gather(%x), frontend_attributes={chain_id="0"}
}

%condition (p: s32[]) -> pred[] {
  %end = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[] compare(%p, %end), direction=LT
}

%body (p: s32[]) -> s32[] {
  %f.1 = bf16[16]{0} fusion(%x), kind=kCustom, calls=%start
  %f.2 = bf16[16]{0} fusion(%f.1), kind=kCustom, calls=%start
}

ENTRY %main (x: bf16[16]) -> bf16[4] {
  %w = s32[] while(%i), condition=%condition, body=%body
  ROOT %f = bf16[4]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
}
"""
  assert hlo.read(text) == [
    ("all-gather", "bf16", 32, 4, 3, True, False),
    ("reduce-scatter", "bf16", 32, 4, 1, False, False),
  ]


@pytest.mark.parametrize(
  ("kind", "size"),
  [("ALL_REDUCE", 4096), ("REDUCE_SCATTER", 4096), ("ALL_GATHER", 8192)],
)
def test_what_is_sent_between_slices(kind, size):
  """Through the hosts: a send whose attributes say what it is a part of."""
  line = (
    "(f32[4,8,32]{2,1,0}, u32[], token[]) send(%x, %t), is_host_transfer=true, "
    'frontend_attributes={_xla_megascale_reduce_operation="SUM",'
    '_xla_megascale_target="{1,2}x{0:3}",'
    f'_xla_megascale_transfer_type="{kind}"}}'
  )
  (one,) = spelled(line)
  name = kind.lower().replace("_", "-")
  assert one == (name, "f32", size, 2, 1, False, True)
