"""The denoising loop with classifier-free guidance."""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from i2am.models.sampling import Sampling


class DenoisingLoop:
    """The part of a pipeline that calls the UNet and the scheduler until the latents are clean.

    Mixed into a `DiffusionPipeline` with the components ``unet`` and ``scheduler``.
    """

    unet: Any
    scheduler: Any
    progress_bar: Any

    guidance_order: ClassVar[tuple[str, str]] = ("unconditional", "conditional")
    """Order of the halves in one batch, or of the calls."""
    guidance_in_one_batch: ClassVar[bool] = True
    """False calls the UNet once per half, in that order."""

    _guidance_scale: float = 1.0
    _num_timesteps: int = 0
    _interrupt: bool = False

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the current run; 1 or less means without guidance."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the next step evaluates both halves of guidance."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Number of UNet evaluations of the current run; more than its steps for some samplers."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set ``pipe._interrupt = True`` in a step callback to leave out the remaining steps."""
        return self._interrupt

    def denoise(
        self,
        latents: Tensor,
        conditions: Tensor,
        context: dict[str, Tensor],
        sampling: Sampling,
        options: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Runs the scheduler, whose timesteps are set, from noise to clean latents.

        Args:
            latents: Starting noise ``[samples, channels, h, w]``.
            conditions: What the UNet sees behind the latents, ``[samples, more channels, h, w]``.
            context: Cross-attention context per half of guidance, ``[samples, tokens, width]``.
            sampling: The settings of the run.
            options: Further keyword arguments of the UNet, one entry per sample.

        Raises:
            ValueError: The UNet wants another number of channels, or the scheduler ignores `eta`.
        """
        wanted, given = self.unet.config.in_channels, latents.shape[1] + conditions.shape[1]
        if wanted != given:
            raise ValueError(
                f"unet must take {given} input channels, its configuration has {wanted}"
            )
        step_options = self._step_options(sampling)
        steps = sampling.num_inference_steps
        self._guidance_scale, self._interrupt = sampling.guidance_scale, False
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        # samplers that evaluate more often than they step: a warm-up, or several evaluations a step
        order = getattr(self.scheduler, "order", 1)
        warmup = len(timesteps) - steps * order

        with self.progress_bar(total=steps) as progress:
            for index, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                prediction = self._predict(latents, conditions, context, timestep, options or {})
                latents = self.scheduler.step(
                    prediction, timestep, latents, **step_options, return_dict=False
                )[0]
                if sampling.callback_on_step_end is not None:
                    names = sampling.callback_on_step_end_tensor_inputs
                    given_tensors = {"latents": latents} if "latents" in names else {}
                    answer = sampling.callback_on_step_end(self, index, timestep, given_tensors)
                    latents = (answer or {}).get("latents", latents)
                last = index == len(timesteps) - 1
                if last or (index + 1 > warmup and (index + 1) % order == 0):
                    progress.update()
        return latents

    def _predict(
        self,
        latents: Tensor,
        conditions: Tensor,
        context: dict[str, Tensor],
        timestep: Tensor,
        options: Mapping[str, Tensor],
    ) -> Tensor:
        """The guided prediction of one step."""
        sample = torch.cat([self.scheduler.scale_model_input(latents, timestep), conditions], dim=1)
        order = self.guidance_order if self.do_classifier_free_guidance else ("conditional",)
        calls = [order] if self.guidance_in_one_batch else [(half,) for half in order]
        predicted: dict[str, Tensor] = {}
        for halves in calls:
            copies = len(halves)
            output = self.unet(
                torch.cat([sample] * copies),
                timestep,
                encoder_hidden_states=torch.cat([context[half] for half in halves]),
                return_dict=False,
                **{name: torch.cat([values] * copies) for name, values in options.items()},
            )[0]
            predicted.update(zip(halves, output.chunk(copies), strict=True))
        if len(order) == 1:
            return predicted["conditional"]
        difference = predicted["conditional"] - predicted["unconditional"]
        return predicted["unconditional"] + self.guidance_scale * difference

    def _step_options(self, sampling: Sampling) -> dict[str, Any]:
        accepted = inspect.signature(self.scheduler.step).parameters
        if sampling.eta and "eta" not in accepted:
            raise ValueError(
                f"eta must be 0 for {type(self.scheduler).__name__}, which has no such option, "
                f"got {sampling.eta}"
            )
        offered = {"eta": sampling.eta, "generator": sampling.generator}
        return {name: value for name, value in offered.items() if name in accepted}
