"""The published sampler settings of the four systems, and the schedulers that run them."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from diffusers import DDIMScheduler, PNDMScheduler, SchedulerMixin

from i2am.models.schedulers import CustomModelDDIMScheduler

# what the weights were trained with, whatever samples from them
_OF_THE_WEIGHTS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
)
# the grid of the published code: 981, 961, ..., 1 for 50 steps, the last of which lands on the
# signal of training step 0 instead of a clean image
_GRID = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}


@dataclass(frozen=True)
class Sampler:
    """A scheduler and the arguments of a pipeline call that go with it.

    Args:
        scheduler: Class of the scheduler.
        options: What it needs beside the noise schedule of the weights.
        num_inference_steps: Denoising steps; PLMS evaluates the UNet once more.
        guidance_scale: Guidance scale.
        eta: Noise of DDIM.
    """

    scheduler: type[SchedulerMixin]
    options: Mapping[str, Any]
    num_inference_steps: int
    guidance_scale: float
    eta: float = 0.0

    def build(self, current: SchedulerMixin) -> SchedulerMixin:
        """The scheduler, with the noise schedule and prediction type of `current`."""
        kept = {name: current.config[name] for name in _OF_THE_WEIGHTS if name in current.config}
        return self.scheduler(**kept, **self.options)

    def arguments(self) -> dict[str, Any]:
        """``num_inference_steps``, ``guidance_scale`` and ``eta``."""
        return {
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "eta": self.eta,
        }


def _ddim(steps: int, guidance_scale: float) -> Sampler:
    return Sampler(DDIMScheduler, {**_GRID, "clip_sample": False}, steps, guidance_scale)


def _plms(steps: int, guidance_scale: float) -> Sampler:
    return Sampler(PNDMScheduler, {**_GRID, "skip_prk_steps": True}, steps, guidance_scale)


def _custom(steps: int, guidance_scale: float) -> Sampler:
    return Sampler(CustomModelDDIMScheduler, {"clip_sample": False}, steps, guidance_scale)


Samplers = Mapping[str, Sampler]
"""``"paper"``: settings of the I2AM paper's experiments; ``"official"``: those of each system's
own published code."""

PAINT_BY_EXAMPLE: Samplers = MappingProxyType({"paper": _ddim(50, 5.0), "official": _plms(50, 5.0)})
DCI_VTON: Samplers = MappingProxyType({"paper": _ddim(50, 1.0), "official": _plms(100, 1.0)})
STABLEVITON: Samplers = MappingProxyType({"paper": _ddim(50, 5.0), "official": _plms(50, 1.0)})
CUSTOM: Samplers = MappingProxyType({"paper": _custom(50, 5.0), "official": _custom(50, 5.0)})
