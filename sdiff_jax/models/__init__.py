"""Networks: each public module of this package registers one, as its `build`.

Facts of a registration: `minimal` are arguments of a network that the tests of all
networks build; `tiny` are fields of a small network for `experiment.variants.make_tiny`;
`sample_ndim` is the number of axes of a sample, if it is fixed (3 for images);
`unrolled`, `without_kernels` and `without_remat` map fields to those of another program
for the same function (see `experiment.build.model_variant`).
"""

import functools

from sdiff_jax import registry

__getattr__ = functools.partial(registry.public_module, __name__)
