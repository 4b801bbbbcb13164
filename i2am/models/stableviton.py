"""StableVITON: dresses a person by attention between the garment's features and the UNet's."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SchedulerMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from i2am.data.arrays import ImageInput
from i2am.models import samplers
from i2am.models.inputs import (
    common_batch,
    fit,
    read_images,
    read_masks,
    read_person,
)
from i2am.models.paint_by_example_encoder import PaintByExampleImageEncoder
from i2am.models.sampling import Callback, Generators, Sampling
from i2am.models.single_token import SingleTokenPipeline, normalised_for_clip
from i2am.models.stableviton_unet import StableVITONUNet

if TYPE_CHECKING:
    from i2am.layouts import TokenLayout


class StableVITONPipeline(SingleTokenPipeline):
    """Dresses a person in a garment.

    The UNet's 13 input channels are the noisy latents, the VAE latents of the agnostic image (the
    person, grey where the mask is), the KEEP mask (0 where the image is to be generated) and the
    VAE latents of a pose image. The garment enters twice: as one CLIP token, and as VAE latents,
    encoded once per run, from which a spatial encoder makes the keys of the warp blocks. Guidance
    evaluates two calls, conditional first; the unconditional one replaces the CLIP token, in both
    networks, and nothing else.

    Runs start, as published, from the noised latents of the person: some of the pixels to be
    painted over, 0.07 of their latents, remains in the start, also where they show the garment
    that is asked for.

    Args:
        vae: Autoencoder with 4 latent channels.
        image_encoder: CLIP encoder, mapper and learned unconditional token.
        unet: 13 input channels, with its spatial encoder and warp blocks.
        scheduler: Any diffusers scheduler with ``alphas_cumprod``; published: PNDM (its PLMS).
    """

    component_classes: ClassVar[Mapping[str, type | tuple[type, ...]]] = {
        **SingleTokenPipeline.component_classes,
        "unet": StableVITONUNet,
    }
    guidance_order = ("conditional", "unconditional")
    guidance_in_one_batch = False
    system = "stableviton"
    samplers = samplers.STABLEVITON

    def __init__(
        self,
        vae: AutoencoderKL,
        image_encoder: PaintByExampleImageEncoder,
        unet: StableVITONUNet,
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__(vae, image_encoder, unet, scheduler)

    def default_size(self, image: ImageInput | None = None) -> tuple[int, int]:
        """(height, width) generated when none is asked for: the UNet's configured size."""
        return self.configured_size

    def attribution_layout(self, *, unet_layers: bool = False) -> "TokenLayout":
        """The warp blocks, whose reference keys mix garment and person; both directions.

        The published maps are those of block 4 alone: ``preset="official"`` when maps are read, or
        ``maps.select(layers="warp_blocks.4.*")`` for that block under another preset.

        Args:
            unet_layers: Record the UNet's cross-attentions to the CLIP token too: R2G only, not
                informative. ``i2am.record(pipe, layout=pipe.attribution_layout(unet_layers=True))``
        """
        from i2am.layouts import TokenLayout

        return TokenLayout.stableviton(unet_layers=unet_layers, guidance_order=self.guidance_order)

    def reference_pixels(
        self, reference_image: ImageInput, size: tuple[int, int] | None = None
    ) -> Tensor:
        """The CLIP encoder's input ``[batch, 3, side, side]``: squashed to a square, normalised.

        Args:
            reference_image: The garment.
            size: (height, width) it is resized to first, antialiased; default the configured size.
        """
        images = fit(read_images(reference_image, "reference_image"), size or self.configured_size)
        return self._clip_pixels(images)

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        reference_image: ImageInput | None = None,
        *,
        pose_image: ImageInput | None = None,
        agnostic_image: ImageInput | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        vae_posterior: str = "sample",
        paste_back: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generates images.

        Images are PIL images, NumPy arrays ``[height, width, 3]``, torch tensors
        ``[3, height, width]`` (uint8, or floating in [0, 1]), batches or lists of these. Floating
        images with negative values are taken to be in [-1, 1], with a warning. Arguments that
        hold one image serve the whole batch. Everything is resized to the generated size.

        Args:
            image: The person.
            mask_image: White (above 0.5) where it is to be generated; of the size of `image`.
            reference_image: The garment.
            pose_image: Rendering of DensePose on black; None stands for an all-black one.
            agnostic_image: A ready agnostic image in place of `image` with its mask painted grey.
            height: Height to generate, default `default_size`; a multiple of the VAE's factor.
            width: The same for the width.
            num_inference_steps: Denoising steps.
            guidance_scale: Weight of the difference to the unconditional prediction; at 1 or
                below only the conditional half is evaluated.
            num_images_per_prompt: Images per input; the output is input-major.
            eta: Noise of DDIM, 0 to 1.
            generator: Source of all noise (start, VAE posteriors of the person, the agnostic and
                the pose image and the garment, `eta`, in this order), or a list with one per
                generated image; with a list an image does not depend on the batch it is made in.
            latents: Starting noise instead of a drawn one; the person is noised with it.
            vae_posterior: "sample" draws from the VAE's posterior as the published code does (the
                garment's once per run instead of in every step), "mode" takes its mode.
            paste_back: Puts the pixels of `image` outside the mask back into the result.
            output_type: "pil", "np", "pt" (both in [0, 1]) or "latent".
            return_dict: False returns a tuple.
            callback_on_step_end: Called as ``f(pipe, index, timestep, {"latents": ...})`` after
                every step; may return ``{"latents": ...}``.
            callback_on_step_end_tensor_inputs: Tensors handed to it; only "latents" is offered.

        Returns:
            `ImagePipelineOutput` with `images`, or ``(images,)``.

        Raises:
            TypeError: An input that is no image.
            ValueError: A missing input, or one of a wrong size, shape, range or batch size; a
                scheduler that cannot noise an image.
        """
        sampling = Sampling(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            generator=generator,
            output_type=output_type,
            vae_posterior=vae_posterior,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        given = (image, mask_image, reference_image)
        missing = [name for name, value in zip(self.needs, given, strict=True) if value is None]
        if mask_image is None or reference_image is None or missing:
            raise ValueError(f"{', '.join(missing)} must be given, got None")
        default = self.default_size()
        size = self.check_size(
            default[0] if height is None else height, default[1] if width is None else width
        )
        person, keep = read_person(image, mask_image, size)
        agnostic = person * keep
        if agnostic_image is not None:
            agnostic = fit(read_images(agnostic_image, "agnostic_image"), size)
        pose = torch.full((1, 3, *size), -1.0)
        if pose_image is not None:
            pose = fit(read_images(pose_image, "pose_image"), size)
        garment = fit(read_images(reference_image, "reference_image"), size)
        batch = common_batch(
            image=len(person),
            agnostic_image=len(agnostic),
            pose_image=len(pose),
            reference_image=len(garment),
        )
        return self.run(
            sampling,
            batch=batch,
            size=size,
            context=self.encode_reference(self._clip_pixels(garment)),
            encoded=[agnostic],
            plain=[self.keep_latents(_keep(mask_image, size))],
            encoded_behind=[pose],
            latents=latents,
            shown={"generated": image, "reference": reference_image},
            paste_onto=(person, keep) if paste_back else None,
            return_dict=return_dict,
            start_from=person,
            hints={"hint": garment},
        )

    def _clip_pixels(self, garment: Tensor) -> Tensor:
        side = self.image_encoder.config.image_size
        # without antialiasing, as the published code
        squares = F.interpolate(garment, size=(side, side), mode="bilinear", align_corners=False)
        return normalised_for_clip(squares)


def _keep(mask_image: ImageInput, size: tuple[int, int]) -> Tensor:
    """The KEEP mask ``[1 or batch, 1, *size]`` that the UNet sees.

    Cut at 0.5 in the size it came in, then resized: the published code leaves its rim soft.
    """
    masks = [(mask <= 0.5).float()[None] for mask in read_masks(mask_image, "mask_image")]
    return torch.cat(
        [F.interpolate(mask, size=size, mode="bilinear", align_corners=False) for mask in masks]
    )
