"""Operations and bytes of kernels: of programs that are known, and of compilers' text."""

import jax
import jax.numpy as jnp
import pytest

from sdiff_jax.capacity import kernels

HEAD = "HloModule m\n\n"


def entry(lines: str, before: str = "") -> list[kernels.Kernel]:
  body = "\n".join(f"  {line.strip()}" for line in lines.strip().splitlines())
  return kernels.read(
    f"{HEAD}{before}ENTRY %main (x: f32[8]) -> f32[8] {{\n{body}\n}}\n"
  )


def compiled(function, *shapes):
  arrays = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
  return jax.jit(function).lower(*arrays).compile()


def test_a_product_and_a_sum_on_this_machine():
  def function(a, b):
    return jnp.sum(jnp.tanh(a @ b))

  found = kernels.read(compiled(function, (64, 32), (32, 16)).as_text())
  (product,) = (k for k in found if k.kind == "product")
  assert product.flops == 2 * 64 * 32 * 16
  assert product.bytes == 4 * (64 * 32 + 32 * 16 + 64 * 16)
  assert product.origin == "jit(function)/dot_general"
  assert kernels.flops(found) == product.flops


@pytest.mark.parametrize(
  ("stride", "dilation", "groups", "padding"),
  [(1, 1, 1, "SAME"), (2, 1, 1, "SAME"), (1, 2, 1, "VALID"), (1, 1, 2, "SAME")],
)
def test_a_convolution_counts_what_is_not_padding(stride, dilation, groups, padding):
  def function(x, w):
    return jax.lax.conv_general_dilated(
      x,
      w,
      (stride,) * 2,
      padding,
      rhs_dilation=(dilation,) * 2,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=groups,
    )

  program = compiled(function, (2, 9, 8, 4), (3, 3, 4 // groups, 6))
  (kernel,) = (k for k in kernels.read(program.as_text()) if k.flops)
  assert kernel.kind == "convolution"
  assert kernel.flops == pytest.approx(program.cost_analysis()["flops"], rel=0.01)


def test_a_loop_counts_its_trips_and_reads_slices():
  def function(table, x):
    return jax.lax.scan(lambda x, row: (jnp.tanh(x + row), None), x, table)[0]

  found = kernels.read(compiled(function, (7, 64, 32), (64, 32)).as_text())
  turns = [k for k in found if k.calls == 7 and k.bytes > 1000]
  # A row of the table and the state are read, the new state is written.
  assert sum(k.bytes for k in turns) == pytest.approx(3 * 4 * 64 * 32, rel=0.01)


def test_an_update_in_place_counts_what_is_written():
  def function(table, rows):
    def turn(i, table):
      return jax.lax.dynamic_update_index_in_dim(table, rows * i, i, 0)

    return jax.lax.fori_loop(0, 5, turn, table)

  found = kernels.read(compiled(function, (100, 1000), (1000,)).as_text())
  in_loop = sum(k.bytes for k in found if k.calls == 5)
  assert in_loop < 3 * 4 * 1000  # not the table of 100 rows


WINDOW = "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f"
X, W, Y = (
  "bf16[32,64,64,8]{3,2,1,0}",
  "bf16[16,3,3,8]{3,2,1,0}",
  "bf16[32,64,64,16]{3,2,1,0}",
)


@pytest.mark.parametrize(
  ("call", "operands", "result"),
  [
    ("convForward", (X, W), Y),
    ("convBiasActivationForward", (X, W), Y),
    ("convBackwardInput", (Y, W), X),
    ("convBackwardFilter", (X, Y), W),
  ],
)
def test_the_three_convolutions_of_cudnn_do_the_same_work(call, operands, result):
  (kernel,) = entry(f"""
    %a = {operands[0]} parameter(0)
    %b = {operands[1]} parameter(1)
    %c = ({result}, u8[0]{{0}}) custom-call(%a, %b), {WINDOW}, custom_call_target="__cudnn${call}"
  """)
  assert kernel.kind == "convolution"
  assert kernel.flops == 2 * (32 * 64 * 64 * 16) * (3 * 3 * 8)
  assert kernel.bytes == 2 * (32 * 64 * 64 * (8 + 16) + 16 * 9 * 8)


def test_a_product_of_cublas():
  dims = '"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}'
  call = f'custom_call_target="__cublas$lt$matmul", backend_config={{{dims}}}'
  (kernel,) = entry(f"""
    %a = bf16[4,32,64]{{2,1,0}} parameter(0)
    %b = bf16[4,32,8]{{2,1,0}} parameter(1)
    %c = f32[4,64,8]{{2,1,0}} custom-call(%a, %b), {call}
  """)
  assert kernel.kind == "product"
  assert kernel.flops == 2 * 4 * 64 * 8 * 32


def test_what_stays_on_a_core_of_a_tpu_is_no_traffic():
  (kernel,) = entry("""
    %a = f32[8,128]{1,0:T(8,128)S(1)} parameter(0)
    %b = f32[8,128]{1,0:T(8,128)} parameter(1)
    ROOT %c = f32[8,128]{1,0:T(8,128)S(1)} add(%a, %b)
  """)
  assert kernel == ("memory", 0.0, 4 * 8 * 128, 1, "")


def test_products_inside_fusions_of_a_tpu():
  inner = """%inner (p: f32[8]) -> f32[8] {
  %p0 = bf16[64,32]{1,0} parameter(0)
  %p1 = bf16[32,16]{1,0} parameter(1)
  ROOT %dot = f32[64,16]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%outer (p: f32[8]) -> f32[8] {
  %q0 = bf16[64,32]{1,0} parameter(0)
  %q1 = bf16[32,16]{1,0} parameter(1)
  ROOT %f = f32[64,16]{1,0} fusion(%q0, %q1), kind=kOutput, calls=%inner
}

"""
  (kernel,) = entry(
    """
    %a = bf16[64,32]{1,0} parameter(0)
    %b = bf16[32,16]{1,0} parameter(1)
    ROOT %c = f32[64,16]{1,0} fusion(%a, %b), kind=kOutput, calls=%outer
    """,
    inner,
  )
  assert kernel[:2] == ("product", 2.0 * 64 * 32 * 16)


def test_a_slice_of_stacked_weights_inside_fusions_of_a_tpu():
  """One block's weights are read, those of the others are not."""
  inner = """%inner (p: f32[8]) -> f32[8] {
  %p0 = bf16[12,32,16]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = bf16[1,32,16]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero)
  ROOT %own = bf16[32,16]{1,0} bitcast(%row)
}

%outer (p: f32[8]) -> f32[8] {
  %q0 = bf16[64,32]{1,0} parameter(0)
  %q1 = bf16[12,32,16]{2,1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %f = bf16[32,16]{1,0} fusion(%q1, %q2), kind=kLoop, calls=%inner
  ROOT %dot = f32[64,16]{1,0} convolution(%q0, %f), dim_labels=bf_io->bf
}

"""
  (kernel,) = entry(
    """
    %a = bf16[64,32]{1,0} parameter(0)
    %b = bf16[12,32,16]{2,1,0} parameter(1)
    %i = s32[] parameter(2)
    ROOT %c = f32[64,16]{1,0} fusion(%a, %b, %i), kind=kOutput, calls=%outer
    """,
    inner,
  )
  index = 4
  assert kernel.bytes == 2 * (64 * 32 + 32 * 16) + index + 4 * 64 * 16


def test_collectives_and_names_are_no_kernels():
  assert not entry("""
    %a = f32[8]{0} parameter(0)
    %b = f32[8]{0} all-reduce(%a), replica_groups={{0,1}}, to_apply=%add
    %c = (f32[8]{0}, f32[8]{0}) all-gather-start(%a), replica_groups={{0,1}}
    %d = f32[8]{0} all-gather-done(%c)
    ROOT %e = (f32[8]{0}) tuple(%b)
  """)


def test_kernels_of_pallas_have_what_the_others_leave():
  found = entry("""
    %a = f32[8]{0} parameter(0)
    %b = f32[8]{0} custom-call(%a), custom_call_target="__gpu$xla.gpu.triton"
    %c = f32[8]{0} custom-call(%b), custom_call_target="tpu_custom_call"
    ROOT %d = f32[8]{0} add(%b, %c)
  """)
  assert [k.kind for k in found] == ["custom", "custom", "memory"]
  assert kernels.flops(kernels.with_custom(found, 100.0)) == 100
  assert kernels.with_custom(found[2:], 100.0) == found[2:]


def test_equal_kernels_are_one_with_all_calls():
  one = kernels.Kernel("product", 8.0, 16, 2, "a")
  other = one._replace(origin="b")
  found = kernels.distinct([one, other, one._replace(calls=3)])
  assert found == [one._replace(calls=5), other]
  assert kernels.launches(found) == 7
  assert kernels.traffic(found) == 7 * 16
