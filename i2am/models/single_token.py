"""What the systems share whose reference is one CLIP token: Paint-by-Example and its children."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from i2am.data.arrays import ImageInput, OneInput, as_list
from i2am.data.images import as_rgb
from i2am.models.base import ReferencePipeline
from i2am.models.inputs import read_images, resize_antialiased
from i2am.models.paint_by_example_encoder import PaintByExampleImageEncoder

if TYPE_CHECKING:
    from i2am.layouts import TokenLayout

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class SingleTokenPipeline(ReferencePipeline):
    """The networks of Paint-by-Example, and how they are given a reference and a mask.

    The context is one token, so attention over keys is identically 1. Guidance evaluates one
    batch, unconditional half first.

    Args:
        vae: Autoencoder with 4 latent channels.
        image_encoder: CLIP encoder, mapper and learned unconditional token.
        unet: 9 input channels: noisy latents, latents of an image, KEEP mask.
        scheduler: Any diffusers scheduler.
    """

    component_classes: ClassVar[Mapping[str, type | tuple[type, ...]]] = {
        "vae": AutoencoderKL,
        "image_encoder": PaintByExampleImageEncoder,
        "unet": UNet2DConditionModel,
        "scheduler": SchedulerMixin,
    }
    guidance_order = ("unconditional", "conditional")

    def __init__(
        self,
        vae: AutoencoderKL,
        image_encoder: PaintByExampleImageEncoder,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, image_encoder=image_encoder, unet=unet, scheduler=scheduler)

    def attribution_layout(self) -> "TokenLayout":
        """One reference token without a place in the reference, unconditional half first."""
        from i2am.layouts import TokenLayout

        return TokenLayout.single_token(guidance_order=self.guidance_order)

    def encode_reference(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional context, each ``[batch, 1, context width]``.

        Args:
            pixels: What `reference_pixels` returns.
        """
        pixels = pixels.to(device=self._execution_device, dtype=self.image_encoder.dtype)
        return self.image_encoder(pixels)

    def reference_pixels(self, reference_image: ImageInput) -> Tensor:
        """The encoder's input ``[batch, 3, side, side]``: squashed to a square, normalised."""
        side = self.image_encoder.config.image_size
        squares: list[OneInput] = [
            # PIL's own resampling of 8-bit images, as the published code
            as_rgb(item, "reference_image").resize((side, side), Image.Resampling.BICUBIC)
            if isinstance(item, Image.Image)
            else item
            for item in as_list(reference_image, "reference_image")
        ]
        images = [
            resize_antialiased(image[None], (side, side), "bicubic").clamp(-1, 1)
            for image in read_images(squares, "reference_image")
        ]
        return normalised_for_clip(torch.cat(images))

    def keep_latents(self, keep: Tensor) -> Tensor:
        """The KEEP mask ``[batch, 1, height, width]`` at latent size, as the UNet sees it."""
        cells = [side // self.vae_scale_factor for side in keep.shape[-2:]]
        # bilinear without antialiasing, as the published code: values between 0 and 1 at the rim
        return F.interpolate(keep, size=cells, mode="bilinear", align_corners=False)


def normalised_for_clip(images: Tensor) -> Tensor:
    """Images ``[batch, 3, height, width]`` in [-1, 1] as CLIP's encoder takes them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return ((images + 1) / 2 - mean) / std
