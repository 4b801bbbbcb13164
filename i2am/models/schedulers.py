"""The time grid of the paper's custom model, which stock diffusers schedulers do not offer."""

from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class CustomModelDDIMScheduler(DDIMScheduler):
    """DDIM on the published grid of the custom model, 999, 980, 960, ..., 40, 20 for 50 steps.

    With T training and N inference steps the grid is ``round(k * T / N)`` for k = N, ..., 1, its
    first entry clipped to T - 1. A step goes to the *next entry of the grid*, so the first one is
    a step shorter than the others; the last step returns the predicted clean sample.

    The configuration is `DDIMScheduler`'s, so ``from_config`` converts either way. The grid is
    fixed: ``timestep_spacing``, ``steps_offset`` and ``set_alpha_to_one`` have no effect.

    Example:
        >>> scheduler = CustomModelDDIMScheduler(
        ...     beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        ... )
        >>> scheduler.set_timesteps(50)
        >>> scheduler.timesteps[:3].tolist(), scheduler.timesteps[-1].item()
        ([999, 980, 960], 20)
    """

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Builds the grid.

        Args:
            num_inference_steps: Number of steps, at most half of the training steps.
            device: Where `timesteps` shall live.

        Raises:
            ValueError: `num_inference_steps` is not in 1 ... num_train_timesteps // 2.
        """
        train_steps = self.config.num_train_timesteps
        if not 1 <= num_inference_steps <= train_steps // 2:
            raise ValueError(
                f"num_inference_steps must lie between 1 and {train_steps // 2}, half of the "
                f"training steps, got {num_inference_steps}"
            )
        self.num_inference_steps = num_inference_steps
        grid = [
            min(round(k * train_steps / num_inference_steps), train_steps - 1)
            for k in range(num_inference_steps, 0, -1)
        ]
        self._previous = dict(zip(grid, [*grid[1:], None], strict=True))
        self.timesteps = torch.tensor(grid, dtype=torch.int64, device=device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One DDIM step (equations 12 and 16 of the DDIM paper) to the next entry of the grid.

        Args:
            model_output: The network's output at `timestep`, read as config.prediction_type says.
            timestep: An entry of `timesteps`.
            sample: The noisy sample at `timestep`.
            eta: 0 for deterministic DDIM, 1 for the variance of DDPM.
            generator: Source of the noise when `eta` > 0; a list has one generator per sample.
            return_dict: False returns the tuple (previous sample, predicted clean sample).

        Raises:
            RuntimeError: `set_timesteps` was not called.
            ValueError: `timestep` is not on the grid.
        """
        if self.num_inference_steps is None:
            raise RuntimeError("call set_timesteps(num_inference_steps) before step()")
        now = int(timestep)
        if now not in self._previous:
            raise ValueError(
                f"timestep must be an entry of the grid {self.timesteps[:3].tolist()}..., got {now}"
            )
        previous = self._previous[now]
        alpha = self.alphas_cumprod[now]
        alpha_previous = (
            torch.ones_like(alpha) if previous is None else self.alphas_cumprod[previous]
        )

        clean, noise = self._split(model_output, sample, alpha)
        variance = (1 - alpha_previous) / (1 - alpha) * (1 - alpha / alpha_previous)
        direction = (1 - alpha_previous - eta**2 * variance).clamp(min=0).sqrt() * noise
        result = alpha_previous.sqrt() * clean + direction
        if eta > 0:
            fresh = randn_tensor(
                sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
            )
            result = result + eta * variance.sqrt() * fresh
        if not return_dict:
            return result, clean
        return DDIMSchedulerOutput(prev_sample=result, pred_original_sample=clean)

    def _split(self, output: Tensor, sample: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """The clean sample and the noise that `output` stands for."""
        signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
        kind = self.config.prediction_type
        if kind == "epsilon":
            clean, noise = (sample - sigma * output) / signal, output
        elif kind == "sample":
            clean, noise = output, (sample - signal * output) / sigma
        elif kind == "v_prediction":
            clean, noise = signal * sample - sigma * output, signal * output + sigma * sample
        else:
            raise ValueError(
                "prediction_type must be epsilon, sample or v_prediction, got " + repr(kind)
            )
        if self.config.thresholding:
            clean = self._threshold_sample(clean)
        elif self.config.clip_sample:
            clean = clean.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return clean, noise
