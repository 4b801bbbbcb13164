"""DCI-VTON: Paint-by-Example's networks, shown the garment where a warp network has laid it."""

from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from i2am.data.arrays import ImageInput
from i2am.data.shapes import require_size
from i2am.models import samplers
from i2am.models.crop import crop_to_object
from i2am.models.inputs import (
    common_batch,
    fit,
    per_sample,
    read_images,
    read_masks,
    read_person,
    same_size,
)
from i2am.models.sampling import Callback, Generators, Sampling
from i2am.models.single_token import SingleTokenPipeline

CROP_ENLARGEMENT = 0.15
"""The middle of the range that the published code draws from, in tests too."""


class DCIVTONPipeline(SingleTokenPipeline):
    """Dresses a person in a garment that has been warped to fit.

    The UNet's 9 input channels are the noisy latents, the VAE latents of the composite (the
    person, grey where the mask is, and over that grey the warped garment) and the KEEP mask. A run
    starts from the noised latents of the same composite. The context is one token, of the garment
    cut out of its picture. The warp network (PF-AFN) is not part of this package: what it wrote is
    an input.

    As in the published code everything is squashed to the square that the UNet was made for, what
    the mask does not cover is put back into the result, and the result gets the person's shape.

    Args:
        vae: Autoencoder with 4 latent channels.
        image_encoder: CLIP encoder, mapper and learned unconditional token.
        unet: 9 input channels.
        scheduler: Any diffusers scheduler with ``alphas_cumprod``; published: PNDM (its PLMS).
    """

    system = "dci-vton"
    samplers = samplers.DCI_VTON
    needs = ("image", "mask_image", "reference_image", "warped_image", "warped_mask_image")

    def default_size(self, image: ImageInput | None = None) -> tuple[int, int]:
        """(height, width) generated when none is asked for: the UNet's configured size."""
        return self.configured_size

    def default_output_size(self, image: ImageInput) -> tuple[int, int]:
        """`default_size` with the width that gives `image` its shape back: 512 x 384 for 4:3.

        Raises:
            TypeError: `image` is no image.
            ValueError: Its entries differ in size.
        """
        rows, columns = same_size(image, "image")
        height = self.default_size()[0]
        return height, max(round(height * columns / rows), 1)

    def size_arguments(self, size: tuple[int, int]) -> dict[str, Any]:
        """The published way: generated as a square, then resized."""
        return {"output_size": size}

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        reference_image: ImageInput | None = None,
        *,
        warped_image: ImageInput | None = None,
        warped_mask_image: ImageInput | None = None,
        reference_mask_image: ImageInput | None = None,
        agnostic_image: ImageInput | None = None,
        crop_enlargement: float = CROP_ENLARGEMENT,
        height: int | None = None,
        width: int | None = None,
        output_size: tuple[int, int] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        vae_posterior: str = "sample",
        paste_back: bool | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generates images.

        Images are PIL images, NumPy arrays ``[height, width, 3]``, torch tensors
        ``[3, height, width]`` (uint8, or floating in [0, 1]), batches or lists of these. Floating
        images with negative values are taken to be in [-1, 1], with a warning. Arguments that
        hold one image serve the whole batch.

        Args:
            image: The person.
            mask_image: White (above 0.5) where it is to be generated; of the size of `image`.
            reference_image: The garment.
            warped_image: The garment as it would lie on the person, from a warp network's output
                folder: ``cloth-warp``, or ``unpaired-cloth-warp`` for another garment than the
                person's own. Resized to the generated size.
            warped_mask_image: White where `warped_image` shows the garment, from
                ``cloth-warp-mask``; of its size. Values between 0 and 1 blend.
            reference_mask_image: White on the garment in `reference_image`: what lies far from it
                is cut away before the encoder sees it, as in the published code. None for a
                picture that is already cut.
            agnostic_image: A ready agnostic image below the warped garment, in place of `image`
                with its mask painted grey.
            crop_enlargement: By how much of its half extent the box around the garment grows to
                each side. The published code draws 0.1 to 0.2, anew in every run.
            height: Height to generate, default `default_size`; a multiple of the VAE's factor.
            width: The same for the width.
            output_size: (height, width) of the returned images, not latents. None is
                `default_output_size` without a `height` and `width`, else the generated size.
            num_inference_steps: Denoising steps.
            guidance_scale: Weight of the difference to the unconditional prediction; at 1 or
                below only the conditional half is evaluated.
            num_images_per_prompt: Images per input; the output is input-major.
            eta: Noise of DDIM, 0 to 1.
            generator: Source of all noise (start, VAE posteriors of the start and of the
                composite, `eta`, in this order), or a list with one per generated image; with a
                list an image does not depend on the batch it is made in.
            latents: Starting noise instead of a drawn one; the composite is noised with it.
            vae_posterior: "sample" draws from the VAE's posterior as the published code does,
                "mode" takes its mode.
            paste_back: Puts the pixels of `image` outside the mask back into the result. None
                does so wherever there are pixels, that is except for latents.
            output_type: "pil", "np", "pt" (both in [0, 1]) or "latent".
            return_dict: False returns a tuple.
            callback_on_step_end: Called as ``f(pipe, index, timestep, {"latents": ...})`` after
                every step; may return ``{"latents": ...}``.
            callback_on_step_end_tensor_inputs: Tensors handed to it; only "latents" is offered.

        Returns:
            `ImagePipelineOutput` with `images`, or ``(images,)``.

        Raises:
            TypeError: An input that is no image.
            ValueError: A missing input, or one of a wrong size, shape, range or batch size.
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
        if image is None or mask_image is None or reference_image is None:
            given = {"image": image, "mask_image": mask_image, "reference_image": reference_image}
            missing = [name for name, value in given.items() if value is None]
            raise ValueError(f"{', '.join(missing)} must be given, got None")
        if warped_image is None or warped_mask_image is None:
            name = "warped_image" if warped_image is None else "warped_mask_image"
            raise ValueError(
                f"{name} must be given, got None: DCI-VTON needs the output of a warp network, "
                "such as PF-AFN, which is not part of i2am"
            )
        default = self.default_size()
        size = self.check_size(
            default[0] if height is None else height, default[1] if width is None else width
        )
        if output_size is None and height is None and width is None:
            output_size = self.default_output_size(image)
        if output_size is not None and min(output_size) < 1:
            raise ValueError(
                f"output_size must be a height and a width of at least 1, got {output_size}"
            )

        person, keep = read_person(image, mask_image, size)
        warped, covered = _read_warped(warped_image, warped_mask_image, size)
        if agnostic_image is None:
            agnostic = person * keep
        else:
            agnostic = fit(read_images(agnostic_image, "agnostic_image"), size)
        reference = reference_image
        if reference_mask_image is not None:
            reference = crop_to_object(
                reference_image,
                reference_mask_image,
                crop_enlargement,
                name="reference_image",
                mask_name="reference_mask_image",
            )
        pixels = self.reference_pixels(reference)
        batch = common_batch(
            image=len(person),
            warped_image=len(warped),
            agnostic_image=len(agnostic),
            reference_image=len(pixels),
        )
        # the garment may lie beside the mask, where the person's own pixels stay
        covered = covered * (1 - keep)
        composite = agnostic * (1 - covered) + warped * covered
        if paste_back is None:
            paste_back = output_type != "latent"
        return self.run(
            sampling,
            batch=batch,
            size=size,
            context=self.encode_reference(pixels),
            encoded=[composite],
            plain=[self.keep_latents(keep)],
            latents=latents,
            shown={"generated": image, "reference": reference_image},
            paste_onto=(person, keep) if paste_back else None,
            return_dict=return_dict,
            start_from=composite,
            output_size=None if output_size == size else output_size,
        )


def _read_warped(
    warped_image: ImageInput, warped_mask_image: ImageInput, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Warped garments ``[batch, 3, *size]`` in [-1, 1] and their masks ``[batch, 1, *size]``."""
    images = read_images(warped_image, "warped_image")
    masks = read_masks(warped_mask_image, "warped_mask_image")
    batch = common_batch(warped_image=len(images), warped_mask_image=len(masks))
    for index in range(batch):
        wanted = tuple(images[index % len(images)].shape[-2:])
        found = tuple(masks[index % len(masks)].shape[-2:])
        require_size("warped_mask_image", found, "warped_image", wanted)
    return per_sample(fit(images, size), batch, 1), per_sample(fit(masks, size), batch, 1)
