"""Between pixels and latents: sizes, starting latents, the autoencoder with its scale."""

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from i2am.models.inputs import per_sample
from i2am.models.sampling import Generators, Sampling


class LatentSpace:
    """The part of a pipeline that knows its VAE, the sizes it can make and where runs start.

    Mixed into a `DiffusionPipeline` with the components ``vae``, ``unet`` and ``scheduler``.
    """

    vae: Any
    unet: Any
    scheduler: Any
    _execution_device: torch.device

    @property
    def vae_scale_factor(self) -> int:
        """Image pixels per latent cell along one side."""
        factor = getattr(self.vae, "spatial_compression_ratio", None)
        return int(factor or 2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def configured_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the UNet was made for.

        Raises:
            ValueError: Its configuration does not say.
        """
        cells = self.unet.config.sample_size
        match cells:
            case int():
                rows, columns = cells, cells
            case (int(rows), int(columns)):
                pass
            case _:
                raise ValueError(
                    f"height and width must be given for a unet whose configuration has no size, "
                    f"got sample_size {cells!r}"
                )
        return rows * self.vae_scale_factor, columns * self.vae_scale_factor

    def check_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width), if the VAE can encode it.

        Raises:
            ValueError: A side is not a positive multiple of the VAE's scale factor.
        """
        factor = self.vae_scale_factor
        for name, side in (("height", height), ("width", width)):
            if side < factor or side % factor:
                raise ValueError(f"{name} must be a positive multiple of {factor}, got {side}")
        return height, width

    def prepare_latents(
        self, samples: int, size: tuple[int, int], generator: Generators, latents: Tensor | None
    ) -> Tensor:
        """The starting noise ``[samples, channels, height / factor, width / factor]``.

        Raises:
            ValueError: Not one generator per sample, or given latents of another shape.
        """
        if isinstance(generator, list) and len(generator) != samples:
            raise ValueError(
                f"generator must be one generator or a list of {samples}, one per image to "
                f"generate, got {len(generator)}"
            )
        factor = self.vae_scale_factor
        channels = self.vae.config.latent_channels
        shape = (samples, channels, size[0] // factor, size[1] // factor)
        device, dtype = self._execution_device, self.unet.dtype
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {list(shape)}, got {list(latents.shape)}")
        return latents.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma

    def noised(self, clean: Tensor, noise: Tensor) -> Tensor:
        """``sqrt(a) * clean + sqrt(1 - a) * noise``, a the signal left at the last training step.

        That step (999 of 1000) is taken whatever the first timestep of the run is, as published:
        a run from 981 starts from latents that are noised a little more than it believes.

        Args:
            clean: Latents ``[samples, channels, h, w]``.
            noise: What `prepare_latents` returns, of the same shape.

        Raises:
            ValueError: The scheduler's noise has no schedule of that kind.
        """
        signals = getattr(self.scheduler, "alphas_cumprod", None)
        if signals is None or float(self.scheduler.init_noise_sigma) != 1:
            raise ValueError(
                "scheduler must have alphas_cumprod and noise of variance 1, as DDIM and PNDM, "
                f"for a run that starts from an image, got {type(self.scheduler).__name__}"
            )
        signal = float(signals[-1])
        start = signal**0.5 * clean.float() + (1 - signal) ** 0.5 * noise.float()
        return start.to(noise.dtype)

    def encode_image(self, images: Tensor, batch: int, sampling: Sampling) -> Tensor:
        """Scaled VAE latents, one per sample; sample-major when several images are asked for.

        Args:
            images: ``[1 or batch, 3, height, width]`` in [-1, 1].
            batch: Number of inputs; each becomes `sampling.num_images_per_prompt` samples.
            sampling: Its `vae_posterior` chooses between the posterior's mode and a draw from it,
                made per sample with its `generator`.
        """
        config = self.vae.config
        pixels = images.to(device=self._execution_device, dtype=self.vae.dtype)
        posterior = self.vae.encode(pixels).latent_dist
        moments = per_sample(posterior.parameters, batch, sampling.num_images_per_prompt)
        posterior = type(posterior)(moments)
        if sampling.vae_posterior == "mode":
            latents = posterior.mode()
        else:
            latents = posterior.sample(sampling.generator)
        latents = (latents - (config.shift_factor or 0)) * config.scaling_factor
        return latents.to(self.unet.dtype)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images ``[samples, 3, height, width]``, about [-1, 1]."""
        config = self.vae.config
        latents = latents.to(self.vae.dtype) / config.scaling_factor + (config.shift_factor or 0)
        return self.vae.decode(latents, return_dict=False)[0]
