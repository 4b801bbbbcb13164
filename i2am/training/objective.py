"""Stage 2: the diffusion loss of the UNet, the projection and the reference encoder."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import Dinov2Model

from i2am.models.custom import CustomPipeline
from i2am.models.projection import ReferenceProjection
from i2am.training.draws import Order, generator
from i2am.training.latents import ENCODED, LatentScenes
from i2am.training.recipe import Denoiser
from i2am.training.trainable import select_parameters

PREDICTIONS = ("epsilon", "v_prediction", "sample")
# where `noise_errors` looks: a good model of the garment shows most where the image is almost noise
NOISY = 900


class Networks(nn.Module):
    """Everything of stage 2 that has weights, with one forward pass from garment to prediction.

    Args:
        unet: 12 input channels.
        image_encoder: Encoder of the garment.
        image_proj: Projection of its tokens; holds the unconditional context.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        image_encoder: Dinov2Model,
        image_proj: ReferenceProjection,
    ) -> None:
        super().__init__()
        self.unet, self.image_encoder, self.image_proj = unet, image_encoder, image_proj

    def forward(self, sample: Tensor, timesteps: Tensor, garment: Tensor, kept: Tensor) -> Tensor:
        """The UNet's prediction ``[batch, 4, h, w]``.

        Args:
            sample: Noisy latents, agnostic and pose latents, ``[batch, 12, h, w]``.
            timesteps: ``[batch]``, int64.
            garment: ``[batch, 3, reference height, reference width]`` in [-1, 1].
            kept: bool ``[batch]``, False for the unconditional context.
        """
        tokens = self.image_encoder(pixel_values=garment).last_hidden_state
        conditional, unconditional = self.image_proj(tokens)
        # torch.where, not indexing: both halves then have gradients in every step of every process
        context = torch.where(kept[:, None, None], conditional, unconditional)
        return self.unet(sample, timesteps, encoder_hidden_states=context).sample


class DenoiserStage:
    """Trains a custom pipeline without its autoencoder.

    Args:
        pipeline: The model.
        recipe: Loss and schedule.
        scenes: Encoded training scenes.
        held_out: One batch of encoded scenes for `noise_errors`.
        seed: Seed of order and noise.
        panels: More metrics, called with the step at every validation.
    """

    name = "denoiser"

    def __init__(
        self,
        pipeline: CustomPipeline,
        recipe: Denoiser,
        scenes: LatentScenes,
        held_out: Mapping[str, Tensor],
        seed: int,
        panels: Callable[[int], dict[str, float]] | None = None,
    ) -> None:
        self.pipeline, self.recipe, self.optimisation = pipeline, recipe, recipe.optimisation
        self.scenes, self.held_out, self.seed, self.panels = scenes, held_out, seed, panels
        select_parameters(pipeline, recipe.trainable)
        self.networks = Networks(pipeline.unet, pipeline.image_encoder, pipeline.image_proj)
        self.module: nn.Module = self.networks
        self.order = Order(len(scenes), seed, self.name)
        self.prediction = pipeline.scheduler.config.prediction_type
        if self.prediction not in PREDICTIONS:
            raise ValueError(
                f"the scheduler's prediction_type must be one of {', '.join(PREDICTIONS)}, "
                f"got {self.prediction!r}"
            )
        self._open = ExitStack()
        self._variation: Any = None
        self._needed = [*ENCODED, "garment", "mask"]
        if recipe.attention_tv:
            if "garment_region" not in scenes.arrays:
                raise ValueError("attention_tv needs scenes with a garment_region, got none")
            self._needed.append("garment_region")
            from i2am.training.attention_tv import AttentionTotalVariation

            self._variation = self._open.enter_context(
                AttentionTotalVariation(
                    pipeline.unet,
                    weight=recipe.attention_tv,
                    reference_grid=pipeline.reference_grid,
                )
            )

    def close(self) -> None:
        """Gives the UNet back as it was."""
        self._open.close()

    def loss(
        self, module: nn.Module, step: int, micro: int, rank: int, world: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted error of the prediction on one batch."""
        plan, recipe = self.optimisation, self.recipe
        device = self.pipeline.unet.device
        place = ((step * plan.accumulate + micro) * world + rank) * plan.batch
        batch = self.scenes.read(self.order(place, plan.batch), self._needed)
        draws = generator(self.seed, self.name, step, micro, rank)
        noise = torch.randn(batch["image"].shape, generator=draws).to(device)
        timesteps = draw_timesteps(plan.batch, recipe.noisy, draws).to(device)
        kept = draw_kept(plan.batch, recipe.dropout, recipe.dropout_of, draws).to(device)
        batch = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
        predicted, target = self._predict(module, batch, noise, timesteps, kept)
        weight = recipe.outside + recipe.inside * batch["mask"][:, None]
        error = (predicted - target).square()
        loss = (error * weight).mean()
        numbers = {"error": error.mean()}
        if self._variation is not None:
            variation = self._variation.loss(batch["garment_region"], keep=kept)
            loss = loss + variation
            numbers["attention_tv"] = variation
        return loss, numbers

    def validate(self, step: int) -> dict[str, float]:
        """`noise_errors`, and what `panels` measures."""
        more = {} if self.panels is None else self.panels(step)
        return noise_errors(self) | more

    def _predict(
        self,
        module: nn.Module,
        batch: Mapping[str, Tensor],
        noise: Tensor,
        timesteps: Tensor,
        kept: Tensor,
    ) -> tuple[Tensor, Tensor]:
        latents, scheduler = batch["image"], self.pipeline.scheduler
        noisy = scheduler.add_noise(latents, noise, timesteps)
        sample = torch.cat([noisy, batch["agnostic"], batch["pose"]], dim=1)
        predicted = module(sample, timesteps, batch["garment"] * 2 - 1, kept).float()
        if self.prediction == "epsilon":
            return predicted, noise
        if self.prediction == "sample":
            return predicted, latents
        return predicted, scheduler.get_velocity(latents, noise, timesteps)

    def restore(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, predicted: Tensor
    ) -> Tensor:
        """The clean latents that a prediction means."""
        scheduler = self.pipeline.scheduler
        if self.prediction == "sample":
            return predicted
        kept = scheduler.alphas_cumprod.to(latents.device)[timesteps][:, None, None, None]
        noisy = scheduler.add_noise(latents, noise, timesteps)
        if self.prediction == "epsilon":
            return (noisy - (1 - kept).sqrt() * predicted) / kept.sqrt()
        return kept.sqrt() * noisy - (1 - kept).sqrt() * predicted


def draw_timesteps(count: int, noisy: float, draws: torch.Generator) -> Tensor:
    """Timesteps ``[count]`` in 0..999, a share `noisy` of them from ``999 * (1 - .7 u^2)``."""
    uniform = torch.rand(count, generator=draws)
    biased = torch.rand(count, generator=draws) < noisy
    chosen = torch.where(biased, 1 - 0.7 * uniform.square(), uniform)
    return (chosen * 1000).long().clamp(0, 999)


def draw_kept(count: int, dropout: float, per: str, draws: torch.Generator) -> Tensor:
    """bool ``[count]``, False where the reference is dropped: per "sample", or per "batch"."""
    chances = torch.rand(count if per == "sample" else 1, generator=draws)
    return (chances >= dropout).expand(count)


@torch.no_grad()
def noise_errors(stage: DenoiserStage) -> dict[str, float]:
    """Squared error of the predicted latents in the mask, from almost pure noise (t = 900).

    `x0_error` is that with the right garment, `x0_error_wrong` with the garment of the scene
    before: what the model takes from the garment is the difference.
    """
    device = stage.pipeline.unet.device
    batch = {name: values.to(device) for name, values in stage.held_out.items()}
    count = len(batch["image"])
    draws = generator(stage.seed, "noise errors")
    noise = torch.randn(batch["image"].shape, generator=draws).to(device)
    timesteps = torch.full((count,), NOISY, device=device)
    kept = torch.ones(count, dtype=torch.bool, device=device)
    wrong = batch | {"garment": batch["garment"].roll(1, dims=0)}
    errors = {}
    for name, scenes in {"x0_error": batch, "x0_error_wrong": wrong}.items():
        predicted, _ = stage._predict(stage.networks, scenes, noise, timesteps, kept)
        restored = stage.restore(scenes["image"], noise, timesteps, predicted)
        squared = (restored - scenes["image"]).square().mean(dim=1)
        errors[name] = float((squared * scenes["mask"]).sum() / scenes["mask"].sum())
    return errors
