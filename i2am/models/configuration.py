"""Sizes of the custom model as plain data, and pipelines with fresh weights built from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from transformers import Dinov2Config, Dinov2Model

from i2am.models.custom import CustomPipeline
from i2am.models.pocket_autoencoder import PocketAutoencoder
from i2am.models.projection import ReferenceProjection
from i2am.models.schedulers import CustomModelDDIMScheduler

STABLE_DIFFUSION_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}


@dataclass(frozen=True)
class CustomConfiguration:
    """Everything that fixes a custom model but its weights.

    Args:
        vae: Arguments of `vae_class`.
        image_encoder: Arguments of `Dinov2Config`.
        image_proj: Arguments of `ReferenceProjection`.
        unet: Arguments of `UNet2DConditionModel`.
        scheduler: Class of the scheduler.
        scheduler_options: Its arguments.
        reference_size: (height, width) of the reference in pixels.
        vae_class: Class of the autoencoder.
    """

    vae: Mapping[str, Any]
    image_encoder: Mapping[str, Any]
    image_proj: Mapping[str, Any]
    unet: Mapping[str, Any]
    scheduler: type[SchedulerMixin]
    scheduler_options: Mapping[str, Any]
    reference_size: tuple[int, int]
    vae_class: type[AutoencoderKL] | type[PocketAutoencoder] = AutoencoderKL

    def build(self, seed: int = 0) -> CustomPipeline:
        """A pipeline with default-initialised weights, in evaluation mode, `trained` False.

        The same seed gives the same weights; torch's global random state is left as it was.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            modules = {
                "vae": self.vae_class(**self.vae),
                "image_encoder": Dinov2Model(Dinov2Config(**self.image_encoder)),
                "image_proj": ReferenceProjection(**self.image_proj),
                "unet": UNet2DConditionModel(**self.unet),
            }
        return CustomPipeline(
            **{name: module.eval() for name, module in modules.items()},
            scheduler=self.scheduler(**self.scheduler_options),
            reference_size=self.reference_size,
            trained=False,
        )


# Stable Diffusion 1.5 with 12 input channels at 512 x 384, DINOv2 ViT-g/14 at 518 x 392
FULL_SIZE = CustomConfiguration(
    vae={
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 512,
        "scaling_factor": 0.18215,
    },
    image_encoder={
        "hidden_size": 1536,
        "num_hidden_layers": 40,
        "num_attention_heads": 24,
        "mlp_ratio": 4,
        "use_swiglu_ffn": True,
        "image_size": 518,
        "patch_size": 14,
    },
    image_proj={"width": 1536, "context_width": 768, "tokens": 1037, "layers": 3},
    unet={
        "sample_size": (64, 48),
        "in_channels": 12,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,  # diffusers' old name for the number of heads
    },
    scheduler=CustomModelDDIMScheduler,
    scheduler_options=STABLE_DIFFUSION_BETAS,
    reference_size=(518, 392),
)
