"""The paper's custom model: every patch of the reference is a key of every cross-attention."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor
from transformers import Dinov2Model

from i2am.data.arrays import ImageInput
from i2am.models import samplers
from i2am.models.base import ReferencePipeline
from i2am.models.inputs import common_batch, fit, read_images, read_person
from i2am.models.pocket_autoencoder import PocketAutoencoder
from i2am.models.projection import ReferenceProjection
from i2am.models.sampling import Callback, Generators, Sampling

if TYPE_CHECKING:
    from i2am.layouts import TokenLayout


class CustomPipeline(ReferencePipeline):
    """Paints the masked region of a person after a garment, seen patch by patch.

    The UNet's 12 input channels are the noisy latents, the VAE latents of the agnostic image (the
    person with the region to generate painted grey) and the VAE latents of a pose image. Its
    cross-attention context is every DINOv2 token of the reference, class token first, through
    `ReferenceProjection`. Guidance evaluates one batch, conditional half first.

    The published weights want the reference in [-1, 1] as it is, without ImageNet mean and
    standard deviation: that is what this pipeline does.

    Args:
        vae: Autoencoder with 4 latent channels.
        image_encoder: DINOv2; all its tokens behind the final norm are used.
        image_proj: Projection of those tokens, and the learned unconditional context.
        unet: 12 input channels.
        scheduler: Any diffusers scheduler; the published one is `CustomModelDDIMScheduler`.
        reference_size: (height, width) every reference image is resized to.
        trained: Whether the weights are more than random numbers; kept in the configuration.

    Raises:
        ValueError: The reference size does not fit the patches or the projection's token count.
    """

    model_cpu_offload_seq = "image_encoder->image_proj->unet->vae"
    component_classes: ClassVar[Mapping[str, type | tuple[type, ...]]] = {
        "vae": (AutoencoderKL, PocketAutoencoder),
        "image_encoder": Dinov2Model,
        "image_proj": ReferenceProjection,
        "unet": UNet2DConditionModel,
        "scheduler": SchedulerMixin,
    }
    guidance_order = ("conditional", "unconditional")
    system = "custom"
    samplers = samplers.CUSTOM
    agnostic_replaces_person = True

    def __init__(
        self,
        vae: AutoencoderKL | PocketAutoencoder,
        image_encoder: Dinov2Model,
        image_proj: ReferenceProjection,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        reference_size: list[int] | tuple[int, int] = (518, 392),
        trained: bool = True,
    ) -> None:
        super().__init__()
        match reference_size:
            case (int(), int()) if min(reference_size) > 0:
                pass
            case _:
                raise ValueError(
                    f"reference_size must be a height and a width in pixels, got {reference_size!r}"
                )
        self.register_modules(
            vae=vae,
            image_encoder=image_encoder,
            image_proj=image_proj,
            unet=unet,
            scheduler=scheduler,
        )
        self.register_to_config(reference_size=list(reference_size), trained=trained)
        patch = image_encoder.config.patch_size
        rows, columns = self.reference_grid
        if reference_size[0] % patch or reference_size[1] % patch:
            raise ValueError(
                f"reference_size must be a multiple of the encoder's patches of {patch} pixels, "
                f"got {list(reference_size)}"
            )
        if 1 + rows * columns != image_proj.config.tokens:
            raise ValueError(
                f"reference_size {list(reference_size)} gives {1 + rows * columns} tokens, "
                f"image_proj is made for {image_proj.config.tokens}"
            )

    @property
    def trained(self) -> bool:
        """Whether the weights are more than random numbers."""
        return bool(self.config.trained)

    @property
    def reference_size(self) -> tuple[int, int]:
        """(height, width) in pixels of what the encoder sees."""
        height, width = self.config.reference_size
        return height, width

    @property
    def reference_grid(self) -> tuple[int, int]:
        """(rows, columns) of the reference patches."""
        patch = self.image_encoder.config.patch_size
        return self.reference_size[0] // patch, self.reference_size[1] // patch

    def default_size(self, image: ImageInput | None = None) -> tuple[int, int]:
        """(height, width) generated when none is asked for: the UNet's configured size."""
        return self.configured_size

    def attribution_layout(self) -> "TokenLayout":
        """Reference patches behind the class token, conditional half first."""
        from i2am.layouts import TokenLayout

        return TokenLayout.cross_attention(
            grid=self.reference_grid, prefix=1, guidance_order=self.guidance_order
        )

    def encode_reference(self, references: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional context, each ``[batch, 1 + patches, context width]``.

        Args:
            references: Images ``[3, height, width]`` in [-1, 1], any size.
        """
        pixels = fit(references, self.reference_size).to(
            device=self._execution_device, dtype=self.image_encoder.dtype
        )
        tokens = self.image_encoder(pixel_values=pixels).last_hidden_state
        return self.image_proj(tokens.to(self.image_proj.dtype))

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
            image: The person. With `mask_image` it makes the agnostic image: what the mask covers
                (values above 0.5) becomes grey, 0 in [-1, 1].
            mask_image: White where the image is to be generated; of the size of `image`.
            reference_image: The garment.
            pose_image: Rendering of the pose on black; None stands for an all-black one.
            agnostic_image: A ready agnostic image in place of `image` and `mask_image`, which
                must not be given then, unless `paste_back` needs them.
            height: Height to generate, default `default_size`; a multiple of the VAE's factor.
            width: The same for the width.
            num_inference_steps: Denoising steps.
            guidance_scale: Weight of the difference to the unconditional prediction; at 1 or
                below only the conditional half is evaluated.
            num_images_per_prompt: Images per input; the output is input-major.
            eta: Noise of DDIM, 0 to 1.
            generator: Source of all noise (start, VAE posteriors, `eta`, in this order), or a
                list with one per generated image; with a list an image does not depend on the
                batch it is made in.
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
        if reference_image is None:
            raise ValueError("reference_image must be given, got None")
        default = self.default_size()
        size = self.check_size(
            default[0] if height is None else height, default[1] if width is None else width
        )

        given = {"image": image, "mask_image": mask_image}
        names = [name for name, value in given.items() if value is not None]
        if agnostic_image is None and not names:
            raise ValueError("image and mask_image, or agnostic_image, must be given, got None")
        if paste_back and not names:
            raise ValueError("paste_back needs image and mask_image, got None")
        if agnostic_image is not None and names and not paste_back:
            raise ValueError(
                f"{' and '.join(names)} must not be given with agnostic_image, which replaces "
                f"image and mask_image; only paste_back needs them beside it"
            )
        painted = read_person(image, mask_image, size) if names else None
        if agnostic_image is not None:
            agnostic = fit(read_images(agnostic_image, "agnostic_image"), size)
        elif painted is not None:
            agnostic = painted[0] * painted[1]
        if pose_image is None:
            pose = torch.full((1, 3, *size), -1.0)
        else:
            pose = fit(read_images(pose_image, "pose_image"), size)
        references = read_images(reference_image, "reference_image")
        counts = {} if painted is None else {"image": len(painted[0])}
        if agnostic_image is not None:
            counts["agnostic_image"] = len(agnostic)
        batch = common_batch(**counts, pose_image=len(pose), reference_image=len(references))
        return self.run(
            sampling,
            batch=batch,
            size=size,
            context=self.encode_reference(references),
            encoded=[agnostic, pose],
            plain=[],
            latents=latents,
            shown={
                "generated": agnostic_image if image is None else image,
                "reference": reference_image,
            },
            paste_onto=painted if paste_back else None,
            return_dict=return_dict,
        )
