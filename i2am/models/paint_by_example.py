"""Paint-by-Example: inpainting after a reference that enters as a single CLIP token."""

from math import isqrt, prod
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from i2am.data.arrays import ImageInput
from i2am.models import samplers
from i2am.models.inputs import common_batch, read_person, same_size
from i2am.models.sampling import Callback, Generators, Sampling
from i2am.models.single_token import SingleTokenPipeline


class PaintByExamplePipeline(SingleTokenPipeline):
    """Paints the masked region of an image after an example.

    The UNet's 9 input channels are the noisy latents, the VAE latents of the masked image (grey
    where the mask is) and the KEEP mask (0 where the image is to be generated). Its context is one
    token, so attention over keys is identically 1. Guidance evaluates one batch, unconditional
    half first. Loads the public folder, whose safety checker and feature extractor are left out.

    Args:
        vae: Autoencoder with 4 latent channels.
        image_encoder: CLIP encoder, mapper and learned unconditional token.
        unet: 9 input channels.
        scheduler: Any diffusers scheduler; the published ones are PNDM (its PLMS) and DDIM.
    """

    system = "paint-by-example"
    samplers = samplers.PAINT_BY_EXAMPLE

    def default_size(self, image: ImageInput) -> tuple[int, int]:
        """(height, width) generated when none is asked for.

        The image's own shape, shrunk to the area the UNet was made for if it is larger; each side
        rounded down to a multiple of the VAE's scale factor, which is also the least.

        Raises:
            TypeError: `image` is no image.
            ValueError: Its entries differ in size, or the UNet's configuration has no size.
        """
        height, width = same_size(image, "image")
        area = prod(self.configured_size)
        if height * width > area:
            # the square root of the scaled area, in integers: no rounding error at exact fractions
            height, width = isqrt(area * height // width), isqrt(area * width // height)
        factor = self.vae_scale_factor
        return max(height // factor, 1) * factor, max(width // factor, 1) * factor

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        reference_image: ImageInput | None = None,
        *,
        example_image: ImageInput | None = None,
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
        hold one image serve the whole batch.

        Args:
            image: The image to paint on.
            mask_image: White (above 0.5) where it is to be generated; of the size of `image`.
            reference_image: The example.
            example_image: Another name for `reference_image`.
            height: Height to generate, default `default_size`; a multiple of the VAE's factor.
            width: The same for the width.
            num_inference_steps: Denoising steps.
            guidance_scale: Weight of the difference to the unconditional prediction; at 1 or
                below only the conditional half is evaluated.
            num_images_per_prompt: Images per input; the output is input-major.
            eta: Noise of DDIM, 0 to 1.
            generator: Source of all noise (start, VAE posterior, `eta`, in this order), or a list
                with one per generated image; with a list an image does not depend on the batch
                it is made in.
            latents: Starting noise instead of a drawn one.
            vae_posterior: "sample" draws from the VAE's posterior as the published code does,
                "mode" takes its mode.
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
        if reference_image is not None and example_image is not None:
            raise ValueError("give reference_image or example_image, they are the same input")
        reference = example_image if reference_image is None else reference_image
        if image is None or mask_image is None or reference is None:
            given = {"image": image, "mask_image": mask_image, "reference_image": reference}
            missing = [name for name, value in given.items() if value is None]
            raise ValueError(f"{', '.join(missing)} must be given, got None")
        if height is None or width is None:
            default = self.default_size(image)
            height = default[0] if height is None else height
            width = default[1] if width is None else width
        size = self.check_size(height, width)

        person, keep = read_person(image, mask_image, size)
        pixels = self.reference_pixels(reference)
        batch = common_batch(image=len(person), reference_image=len(pixels))
        return self.run(
            sampling,
            batch=batch,
            size=size,
            context=self.encode_reference(pixels),
            encoded=[person * keep],
            plain=[self.keep_latents(keep)],
            latents=latents,
            shown={"generated": image, "reference": reference},
            paste_onto=(person, keep) if paste_back else None,
            return_dict=return_dict,
        )
