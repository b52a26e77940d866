"""TrigFlow teacher on Fashion-MNIST, 28 x 28: a small EDM2 U-Net.

  python -m sdiff_jax.main --config=configs/fashion_unet_diffusion.py

The images are those of Debian's package dataset-fashion-mnist. Variants: `h100` (the
default), 9.1 million parameters and 9.1 GFLOP for each image of a training step, whose
number of steps `python benchmarks/h100.py --stage=train` chooses for a loan of minutes;
`laptop`, 1.7 million parameters and 0.71 GFLOP on patches of 2 x 2 pixels, 86 minutes of
two cores with XLA_FLAGS=--xla_force_host_platform_device_count=2, a device for each core;
samples are best with --config.sampler.name=dpmpp2m --config.sampler.steps=8
--config.sample.guidance=1.25.
"""

from sdiff_jax import config
from sdiff_jax.experiment import variants

NETWORKS = {
  "h100": {"channels": 64, "channel_mult": (1, 2, 2), "dtype": "bfloat16"},
  "laptop": {
    "patch": 2,
    "channels": 48,
    "channel_mult": (1, 2),
    "blocks": 1,
    "head_channels": 48,
  },
}
# Steps, batch size, learning rate, images of its warm-up.
LENGTHS = {"h100": (7486, 512, 5e-3, 100_000), "laptop": (14_000, 64, 3e-3, 10_000)}


def get_config(variant: str = ""):
  (machine,) = variants.parse(variant, NETWORKS)
  steps, batch_size, rate, rampup = LENGTHS[machine]
  c = config.base()
  c.data = config.component("data", "idx")
  c.reference = config.component("data", "idx", split="test")
  c.model = config.component(
    "models", "edm2", attn_resolutions=(7,), dropout=0.0, **NETWORKS[machine]
  )
  c.loss = config.component("losses", "diffusion")
  c.train.update(steps=steps, batch_size=batch_size, log_every=50)
  c.checkpoint.update(every=1000, keep_every=0)
  # The schedule does not depend on the number of steps, so a run can be sized late.
  c.optim.update(learning_rate=rate, b1=0.9, b2=0.99, schedule="inverse_sqrt")
  c.optim.update(reference_steps=1000, rampup_images=rampup)
  c.ema.profiles = ("power/0.1",)
  c.sampler.update(name="heun", steps=16)
  c.evaluate.update(features="fashion", num=10_000, batch_size=1000)
  c.evaluate.samplers = ("heun/16", "ddim/8", "ddim/4", "consistency/1")
  c.evaluate.samplers += ("consistency/2",)
  return c
