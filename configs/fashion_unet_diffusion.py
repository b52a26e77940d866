"""TrigFlow teacher on Fashion-MNIST, 28 x 28: a small EDM2 U-Net, for one GPU.

  python -m sdiff_jax.main --config=configs/fashion_unet_diffusion.py

The images are those of Debian's package dataset-fashion-mnist. 9.1 million parameters,
9.1 GFLOP for each image of a training step. `python benchmarks/h100.py --stage=train`
chooses the number of steps for a loan of minutes.
"""

from sdiff_jax import config


def get_config():
  c = config.base()
  c.data = config.component("data", "idx")
  c.reference = config.component("data", "idx", split="test")
  c.model = config.component(
    "models", "edm2", channels=64, channel_mult=(1, 2, 2), attn_resolutions=(7,)
  )
  c.model.update(dropout=0.0, dtype="bfloat16")
  c.loss = config.component("losses", "diffusion")
  c.train.update(steps=7486, batch_size=512, log_every=50)
  c.checkpoint.update(every=1000, keep_every=0)
  # The schedule does not depend on the number of steps, so a run can be sized late.
  c.optim.update(learning_rate=5e-3, b1=0.9, b2=0.99, schedule="inverse_sqrt")
  c.optim.update(reference_steps=1000, rampup_images=100_000)
  c.ema.profiles = ("power/0.1",)
  c.sampler.update(name="heun", steps=16)
  c.evaluate.update(features="fashion", num=10_000, batch_size=1000)
  c.evaluate.samplers = ("heun/16", "ddim/8", "ddim/4", "consistency/1")
  c.evaluate.samplers += ("consistency/2",)
  return c
