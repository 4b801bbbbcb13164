"""What the reference-guided inpainting pipelines share: loading, samplers, one run."""

import os
from collections.abc import Iterable, Mapping
from copy import deepcopy
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from i2am.data.arrays import ImageInput
from i2am.models.denoising import DenoisingLoop
from i2am.models.inputs import per_sample, resize_antialiased
from i2am.models.latents import LatentSpace
from i2am.models.samplers import Samplers
from i2am.models.sampling import HALVES, Sampling
from i2am.wording import counted

if TYPE_CHECKING:
    from i2am.layouts import TokenLayout

IMAGES = {
    "person": "image",
    "mask": "mask_image",
    "reference": "reference_image",
    "pose": "pose_image",
    "agnostic": "agnostic_image",
    "warped": "warped_image",
    "warped_mask": "warped_mask_image",
    "reference_mask": "reference_mask_image",
}
"""What an image shows, and the argument of a call that takes it, in the pipelines that do."""


class ReferencePipeline(LatentSpace, DenoisingLoop, DiffusionPipeline):
    """Base of the pipelines that paint part of an image after a reference image.

    A subclass names its components and its guidance order, and writes ``__call__`` from the pieces
    below: it prepares its inputs and hands them to `run`.
    """

    model_cpu_offload_seq = "image_encoder->unet->vae"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    component_classes: ClassVar[Mapping[str, type | tuple[type, ...]]] = {}
    """What each component may be; several classes where there is a choice."""
    system: ClassVar[str] = ""
    """What `i2am convert` calls the published checkpoints."""
    samplers: ClassVar[Samplers] = {}
    """The published settings by name, see `use_sampler`."""
    needs: ClassVar[tuple[str, ...]] = ("image", "mask_image", "reference_image")
    """Images that a call cannot do without."""
    agnostic_replaces_person: ClassVar[bool] = False
    """Whether `agnostic_image` stands in for `image` and `mask_image` instead of joining them."""

    shown: Mapping[str, Any] = MappingProxyType({})
    """The pictures of the run in progress, see `run`."""

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
        **components: Any,
    ) -> Self:
        """Loads a folder in diffusers layout; never asks a hub.

        Args:
            folder: Holds model_index.json and one folder per component.
            torch_dtype: Floating dtype of all weights; None keeps float32.
            variant: Middle part of the weight files' names, for example "fp16".
            components: Ready components or options of the pipeline that replace the folder's.

        Raises:
            FileNotFoundError: The folder, or a file in it, is missing.
            TypeError: An option this pipeline does not have.
            ValueError: A file is damaged; a component has another class, or a configuration that
                cannot be or is of a network much larger than its weights; the weights lack keys,
                have extra ones or other shapes, or are NaN, infinite or beyond `torch_dtype`.
        """
        from i2am.models.folders import load_folder

        return load_folder(
            cls, folder, torch_dtype=torch_dtype, variant=variant, replacements=components
        )

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | os.PathLike[str],
        *,
        vae: str | os.PathLike[str] | None = None,
        torch_dtype: torch.dtype | None = None,
        drop: Iterable[str] = (),
    ) -> Self:
        """Loads a checkpoint in its authors' naming, by way of a temporary folder.

        That folder has the size of the model; ``i2am convert`` makes one that stays.

        Args:
            checkpoint: Torch checkpoint or safetensors file.
            vae: A file of an autoencoder alone, to take in place of the checkpoint's own.
            torch_dtype: Floating dtype of all weights; None is float32.
            drop: Beginnings of tensor names to leave out.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A file is damaged or refused, or tensors are missing, unexpected or
                misshapen; see `i2am.models.conversion.convert`.
            OSError: There is too little room in the temporary folder.
        """
        from i2am.models.conversion import convert

        with TemporaryDirectory(prefix="i2am-") as folder:
            model = Path(folder) / "model"
            convert(checkpoint, model, system=cls.system, vae=vae, dtype=torch_dtype, drop=drop)
            pipeline = cls.from_pretrained(model, torch_dtype=torch_dtype)
        pipeline.register_to_config(_name_or_path=os.fspath(checkpoint))
        return pipeline

    def default_size(self, image: ImageInput) -> tuple[int, int]:
        """(height, width) generated for `image` when none is asked for."""
        raise NotImplementedError

    def default_output_size(self, image: ImageInput) -> tuple[int, int]:
        """(height, width) of the images made from `image` when no size is asked for."""
        return self.default_size(image)

    def use_sampler(self, name: str) -> dict[str, Any]:
        """Sets the scheduler of a published setting and returns the call's arguments for it.

        The noise schedule and the prediction type of the weights stay.

        Args:
            name: ``"paper"``, the settings of the I2AM paper, or ``"official"``, those of the
                system's own published code.

        Returns:
            ``num_inference_steps``, ``guidance_scale`` and ``eta``.

        Raises:
            ValueError: There is no setting of that name.

        Example:
            >>> pipe(person, mask, garment, **pipe.use_sampler("paper"))  # doctest: +SKIP
        """
        if name not in self.samplers:
            raise ValueError(f"sampler must be one of {', '.join(self.samplers)}, got {name!r}")
        sampler = self.samplers[name]
        self.register_modules(scheduler=sampler.build(self.scheduler))
        return sampler.arguments()

    def sampling_defaults(self, sampler: str | None = None) -> dict[str, Any]:
        """Steps and guidance of a call that asks for none, after setting a named sampler if any.

        Args:
            sampler: As for `use_sampler`; None keeps the scheduler and the call's own defaults.

        Returns:
            ``num_inference_steps``, ``guidance_scale`` and ``eta``.

        Raises:
            ValueError: There is no setting of that name.
        """
        if sampler is not None:
            return self.use_sampler(sampler)
        parameters = signature(type(self).__call__).parameters
        names = ("num_inference_steps", "guidance_scale", "eta")
        return {name: parameters[name].default for name in names if name in parameters}

    def check_steps(self, steps: int) -> int:
        """The number of denoising steps, if the scheduler can make so many.

        Raises:
            ValueError: It cannot.
        """
        refused = f"{type(self.scheduler).__name__} cannot make {counted(steps, 'step')}"
        trained = self.scheduler.config.get("num_train_timesteps", steps)
        # some would make the last steps twice
        if steps > trained:
            raise ValueError(f"{refused}: the training had {trained}")
        try:
            # a copy: a recorder may follow the scheduler itself
            deepcopy(self.scheduler).set_timesteps(steps)
        except Exception as error:
            # each scheduler has its own way to fail
            raise ValueError(f"{refused}: {error}") from error
        return steps

    def size_arguments(self, size: tuple[int, int]) -> dict[str, Any]:
        """The arguments of a call whose images are to have a size.

        Args:
            size: (height, width) in pixels.

        Raises:
            ValueError: The pipeline cannot make it.
        """
        height, width = self.check_size(*size)
        return {"height": height, "width": width}

    @classmethod
    def takes(cls, image: str) -> bool:
        """Whether a call has an argument for an image, named as in `IMAGES`."""
        return IMAGES[image] in signature(cls.__call__).parameters

    @classmethod
    def requires(cls, image: str) -> bool:
        """Whether a call cannot do without an image, named as in `IMAGES`."""
        return IMAGES[image] in cls.needs

    def image_arguments(
        self, images: Mapping[str, Any], *, paste_back: bool = False
    ) -> dict[str, Any]:
        """The arguments of a call that images are, without those that it does not take.

        Args:
            images: Images, batches or lists of them, named as in `IMAGES`; None counts as missing.
            paste_back: Whether the person's pixels outside the mask are to stay; then a pipeline
                that paints on a ready agnostic image is given the person and the mask as well.
        """
        given = {
            IMAGES[name]: image
            for name, image in images.items()
            if image is not None and self.takes(name)
        }
        if self.agnostic_replaces_person and "agnostic_image" in given and not paste_back:
            for name in ("image", "mask_image"):
                given.pop(name, None)
        return given

    def attribution_layout(self) -> "TokenLayout":
        """Where the reference tokens stand in the recorded layers, and the order of guidance."""
        raise NotImplementedError

    @property
    def trained(self) -> bool:
        """False when the weights are random numbers: maps and images then mean nothing."""
        return True

    def run(
        self,
        sampling: Sampling,
        *,
        batch: int,
        size: tuple[int, int],
        context: tuple[Tensor, Tensor],
        encoded: list[Tensor],
        plain: list[Tensor],
        shown: Mapping[str, Any],
        latents: Tensor | None,
        paste_onto: tuple[Tensor, Tensor] | None,
        return_dict: bool,
        start_from: Tensor | None = None,
        encoded_behind: list[Tensor] | None = None,
        hints: Mapping[str, Tensor] | None = None,
        output_size: tuple[int, int] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """From prepared inputs to images; every input has one entry or `batch` of them.

        Random numbers are drawn in this order: starting noise, VAE posterior of `start_from`,
        those of `encoded`, `encoded_behind` and `hints`, and what the scheduler draws in its steps.

        Args:
            sampling: The settings of the run.
            batch: Number of inputs; each becomes `num_images_per_prompt` samples, side by side.
            size: (height, width) to generate.
            context: Conditional and unconditional context ``[batch, tokens, width]``.
            encoded: Images ``[batch, 3, height, width]`` whose latents the UNet sees.
            plain: What it sees behind them as it is, ``[batch, channels, h, w]`` at latent size.
            shown: The pictures as they were given, "generated" for the one to paint on and
                "reference": what a recording's masks belong to.
            latents: Starting noise instead of a drawn one.
            paste_onto: Image and keep mask to put into the result, or None.
            return_dict: False returns a tuple.
            start_from: Images ``[batch, 3, height, width]`` in [-1, 1] whose noised latents are the
                start instead of noise alone, see `noised`.
            encoded_behind: As `encoded`, for what the UNet sees behind `plain`.
            hints: Images ``[batch, 3, height, width]`` in [-1, 1] by the UNet's keyword argument
                that takes their latents; encoded once, the same in every step and half.
            output_size: (height, width) that the images are resized to in the end, not latents.

        Raises:
            ValueError: A part does not fit the others; see the methods below.
        """
        if paste_onto is not None and sampling.output_type == "latent":
            raise ValueError("paste_back needs an output_type other than 'latent'")
        repeats, device = sampling.num_images_per_prompt, self._execution_device
        # before the noise is drawn: its scale may depend on the timesteps
        self.scheduler.set_timesteps(sampling.num_inference_steps, device=device)
        start = self.prepare_latents(batch * repeats, size, sampling.generator, latents)
        if start_from is not None:
            start = self.noised(self.encode_image(start_from, batch, sampling), start)
        conditions = [self.encode_image(images, batch, sampling) for images in encoded]
        conditions += [per_sample(values, batch, repeats).to(conditions[0]) for values in plain]
        conditions += [
            self.encode_image(images, batch, sampling) for images in encoded_behind or ()
        ]
        options = {
            name: self.encode_image(images, batch, sampling)
            for name, images in (hints or {}).items()
        }
        states = {
            half: per_sample(tokens, batch, repeats).to(device=device, dtype=self.unet.dtype)
            for half, tokens in zip(HALVES, context, strict=True)
        }
        self.shown = shown
        try:
            result = self.denoise(start, torch.cat(conditions, dim=1), states, sampling, options)
        finally:
            # they are the caller's
            self.shown = {}
        if sampling.output_type != "latent":
            result = self.decode_latents(result)
            if paste_onto is not None:
                image, keep = (per_sample(part, batch, repeats).to(result) for part in paste_onto)
                result = image * keep + result * (1 - keep)
            if output_size is not None:
                result = resize_antialiased(result.float().clamp(-1, 1), output_size)
            result = VaeImageProcessor().postprocess(
                result.float(), output_type=sampling.output_type
            )
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if return_dict else (result,)
