"""Stage 1: the autoencoder of a model that is built from scratch."""

import math
from collections.abc import Mapping, Sequence

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from i2am.training.draws import Order, generator
from i2am.training.recipe import Autoencoder
from i2am.training.scenes import PICTURES, CachedScenes

# one draw in this many: what matters most is the image, whose latents are generated
KINDS = ("image", "image", "garment", "agnostic", "pose", "image")


class AutoencoderStage:
    """Trains a VAE on every kind of picture that it will have to encode.

    Args:
        vae: What to train.
        recipe: Weights of the loss, and the schedule.
        scenes: Training scenes.
        held_out: Scenes for `validate`, one batch.
        seed: Seed of order and noise.
        factor: Image pixels per latent cell along one side.
    """

    name = "autoencoder"

    def __init__(
        self,
        vae: AutoencoderKL,
        recipe: Autoencoder,
        scenes: CachedScenes,
        held_out: Mapping[str, Tensor],
        seed: int,
        factor: int,
    ) -> None:
        self.factor = factor
        self.module: nn.Module = _RoundTrip(vae)
        self.vae, self.recipe, self.optimisation = vae, recipe, recipe.optimisation
        self.scenes, self.held_out, self.seed = scenes, held_out, seed
        self.order = Order(len(scenes), seed, self.name)

    def loss(
        self, module: nn.Module, step: int, micro: int, rank: int, world: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction and divergence of one batch."""
        plan = self.optimisation
        place = ((step * plan.accumulate + micro) * world + rank) * plan.batch
        pictures = torch.cat(
            [
                self.scenes.read([scene], [kind := KINDS[(place + row) % len(KINDS)]])[kind]
                for row, scene in enumerate(self.order(place, plan.batch))
            ]
        )
        draws = generator(self.seed, self.name, step, micro, rank)
        device = self.vae.device
        size = (side // self.factor for side in pictures.shape[-2:])
        noise = torch.randn(plan.batch, self.vae.config.latent_channels, *size, generator=draws)
        pictures = pictures.to(device) * 2 - 1
        with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            restored, divergence = module(pictures, noise.to(device))
        restored = restored.float()
        absolute = (restored - pictures).abs().mean()
        squared = (restored - pictures).square().mean()
        edges = sum(
            (restored.diff(dim=axis) - pictures.diff(dim=axis)).abs().mean() for axis in (-2, -1)
        )
        recipe = self.recipe
        loss = absolute + recipe.squared * squared + recipe.edges * edges + recipe.kl * divergence
        return loss, {"absolute": absolute, "squared": squared, "divergence": divergence}

    def validate(self, step: int) -> dict[str, float]:
        """Signal-to-noise ratio in dB of every kind of picture, encoded by the mode."""
        return {f"psnr_{kind}": psnr(self.vae, self.held_out[kind]) for kind in PICTURES}


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of pictures ``[batch, 3, height, width]`` in [0, 1]."""
    ratios = []
    for wanted in pictures.to(vae.device).split(8):
        restored = vae.decode(vae.encode(wanted * 2 - 1).latent_dist.mode()).sample
        error = ((restored / 2 + 0.5).clamp(0, 1) - wanted).square().mean(dim=(1, 2, 3))
        ratios.append(-10 / math.log(10) * error.clamp_min(1e-10).log())
    return float(torch.cat(ratios).mean())


@torch.no_grad()
def whiten(vae: AutoencoderKL, batches: Sequence[Tensor]) -> None:
    """Folds shift and scale per channel into the VAE, so that its latents are about normal.

    What it restores does not change. Afterwards `scaling_factor` is 1 and there is no shift.

    Args:
        vae: With its two 1 x 1 convolutions around the latents.
        batches: Pictures ``[batch, 3, height, width]`` in [-1, 1] to measure on.

    Raises:
        ValueError: The VAE has no such convolutions.
    """
    if vae.quant_conv is None or vae.post_quant_conv is None:
        raise ValueError("vae must have quant_conv and post_quant_conv, got one without")
    latents = torch.cat([vae.encode(batch).latent_dist.mode() for batch in batches]).double()
    shift = latents.mean(dim=(0, 2, 3))
    scale = latents.std(dim=(0, 2, 3)).clamp_min(1e-6)
    channels = len(shift)
    inner, outer = vae.quant_conv, vae.post_quant_conv
    # mean <- (mean - shift) / scale, log-variance <- log-variance - 2 log scale
    weight, bias = inner.weight.double(), inner.bias.double()
    weight[:channels] /= scale[:, None, None, None]
    bias[:channels] = (bias[:channels] - shift) / scale
    bias[channels:] -= 2 * scale.log()
    inner.weight.copy_(weight)
    inner.bias.copy_(bias)
    # the decoder sees latent * scale + shift
    weight = outer.weight.double()
    outer.bias.copy_(outer.bias.double() + (weight[:, :, 0, 0] * shift).sum(dim=1))
    outer.weight.copy_(weight * scale[None, :, None, None])
    vae.register_to_config(scaling_factor=1.0, shift_factor=None)


class _RoundTrip(nn.Module):
    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pictures: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pictures).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        restored = self.vae.decode(mean + noise * (0.5 * logvar).exp()).sample
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return restored, divergence
