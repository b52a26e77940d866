"""What a scheduler_config.json may hold, for each class of a process with betas."""

from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta

from sdiff_jax.pretrained.diffusers import betas, dpm_solver, lcm_scheduler, sigma_grids
from sdiff_jax.pretrained.files.config_fields import Field, Fields, Fraction, Positive

PREDICTION_TYPES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
UNSUPPORTED_FIELDS = (None, False)
Spacing = Literal["leading", "linspace", "trailing"]
FinalSigmas = Literal["zero", "sigma_min"]
FIELDS = betas.FIELDS | {
  "prediction_type": Field("epsilon", Literal[tuple(PREDICTION_TYPES)]),
  "timestep_spacing": Field("leading", Spacing),
}
THRESHOLDING = {
  "thresholding": Field(False, bool | None),
  "dynamic_thresholding_ratio": Field(0.995, Fraction),
  "sample_max_value": Field(1.0, Positive),
}
ZERO_SNR = {"rescale_betas_zero_snr": Field(False, bool)}
LINSPACE = {"timestep_spacing": Field("linspace", Spacing)}
CLIP = {
  "clip_sample": Field(True, bool),
  "clip_sample_range": Field(1.0, Positive),
}
CLIPPED = ZERO_SNR | THRESHOLDING | CLIP
LCM_FIELDS = lcm_scheduler.FIELDS | {
  "beta_start": Field(0.00085, Fraction),
  "beta_end": Field(0.012, Fraction),
  "beta_schedule": Field("scaled_linear", betas.FIELDS["beta_schedule"].type),
  "clip_sample": Field(False, bool),
}
OTHER_GRIDS = {
  f"use_{name}": UNSUPPORTED_FIELDS for name in ("flow_sigmas", "dynamic_shifting")
}
MULTISTEP_FIELDS = (
  LINSPACE
  | THRESHOLDING
  | sigma_grids.FIELDS
  | {
    "solver_order": Field(2, Annotated[int, Meta(ge=1, le=16)]),
    "final_sigmas_type": Field("zero", FinalSigmas),
  }
)
DPM_FIELDS = MULTISTEP_FIELDS | sigma_grids.LU | dpm_solver.FIELDS
DPM_FIELDS |= {"algorithm_type": Field("dpmsolver++", str)}
DPM_SUPPORTED_VALUES = {
  "solver_type": ("midpoint",),
  "lambda_min_clipped": (-np.inf,),
  "variance_type": UNSUPPORTED_FIELDS,
  "flow_shift": (1.0,),
} | OTHER_GRIDS
EULER_SUPPORTED_VALUES = {
  "interpolation_type": ("linear",),
  "timestep_type": ("discrete",),
  "final_sigmas_type": ("zero",),
  "sigma_min": UNSUPPORTED_FIELDS,
  "sigma_max": UNSUPPORTED_FIELDS,
}
UNIPC_SUPPORTED_VALUES = {
  "predict_x0": (True,),
  "solver_type": ("bh2",),
  "lower_order_final": (True,),
  "disable_corrector": ([],),
  "solver_p": UNSUPPORTED_FIELDS,
  "flow_shift": (1.0,),
  "sigma_min": UNSUPPORTED_FIELDS,
  "sigma_max": UNSUPPORTED_FIELDS,
  "shift_terminal": UNSUPPORTED_FIELDS,
} | OTHER_GRIDS
VARIANCES = {
  **{"fixed_small": "ddpm", "fixed_small_log": "ddpm"},
  **{"fixed_large": "ddpm_large", "fixed_large_log": "ddpm_large"},
}
VARIANCE = Field("fixed_small", Literal[tuple(VARIANCES)])
# Class -> its own fields, and those with only some supported values.
CLASSES: dict[str, tuple[Fields, Mapping[str, tuple]]] = {
  "DDIM": (CLIPPED | {"set_alpha_to_one": Field(True, bool)}, {}),
  "DDPM": (CLIPPED | {"variance_type": VARIANCE}, {}),
  "LCM": (CLIPPED | LCM_FIELDS, {}),
  "PNDM": (
    {"set_alpha_to_one": Field(False, bool)},
    {"rescale_betas_zero_snr": UNSUPPORTED_FIELDS},
  ),
  "DPMSolverMultistep": (ZERO_SNR | DPM_FIELDS, DPM_SUPPORTED_VALUES),
  "EulerDiscrete": (ZERO_SNR | LINSPACE | sigma_grids.FIELDS, EULER_SUPPORTED_VALUES),
  "EulerAncestralDiscrete": (ZERO_SNR | LINSPACE, {}),
  "UniPCMultistep": (ZERO_SNR | MULTISTEP_FIELDS, UNIPC_SUPPORTED_VALUES),
}
IGNORED_FIELDS = {"skip_prk_steps", "time_shift_type"}
