"""The settings of one run that every pipeline takes, checked once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Generators = torch.Generator | list[torch.Generator] | None
Callback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
POSTERIORS = ("sample", "mode")
HALVES = ("conditional", "unconditional")


@dataclass(frozen=True)
class Sampling:
    """The settings of one run that both pipelines take, checked once.

    Raises:
        TypeError: `callback_on_step_end` cannot be called.
        ValueError: A number or a choice outside its range; a callback tensor that is not offered.
    """

    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    num_images_per_prompt: int = 1
    eta: float = 0.0
    generator: Generators = None
    output_type: str = "pil"
    vae_posterior: str = "sample"
    callback_on_step_end: Callback | None = None
    callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",)

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "num_images_per_prompt"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if not 0 <= self.guidance_scale < float("inf"):
            raise ValueError(
                f"guidance_scale must be a finite number of at least 0, got {self.guidance_scale}"
            )
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}")
        for name, choices in (("output_type", OUTPUT_TYPES), ("vae_posterior", POSTERIORS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.callback_on_step_end is not None and not callable(self.callback_on_step_end):
            raise TypeError(
                "callback_on_step_end must be callable, "
                f"got {type(self.callback_on_step_end).__name__}"
            )
        unknown = set(self.callback_on_step_end_tensor_inputs) - {"latents"}
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs may name only 'latents', got {sorted(unknown)}"
            )
