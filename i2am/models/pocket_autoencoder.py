"""A small autoencoder that works at a quarter of the resolution, for models trained on a CPU."""

import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn


class PocketAutoencoder(ModelMixin, ConfigMixin):
    """Encodes images to latents four times smaller along each side, as `AutoencoderKL` would.

    Pixels are folded into channels first, so no convolution runs at full resolution: for equal time
    on a CPU it restores pictures several dB better than a small `AutoencoderKL`. Residual blocks
    without normalisation.

    Args:
        latent_channels: Channels of the latents.
        width: Channels at a quarter of the resolution.
        fine_width: Channels of the decoder at half the resolution.
        encoder_blocks: Residual blocks of the encoder.
        decoder_blocks: Residual blocks of the decoder at a quarter of the resolution.
        fine_blocks: Those at half the resolution.
        scaling_factor: What latents are multiplied with for the UNet.
        shift_factor: What is taken from them before that.
    """

    spatial_compression_ratio = 4

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        width: int = 64,
        fine_width: int = 32,
        encoder_blocks: int = 2,
        decoder_blocks: int = 4,
        fine_blocks: int = 2,
        scaling_factor: float = 1.0,
        shift_factor: float | None = None,
    ) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, width, 3, padding=1),
            *(_Residual(width) for _ in range(encoder_blocks)),
            nn.Conv2d(width, 2 * latent_channels, 3, padding=1),
        )
        # as in AutoencoderKL; shift and scale per channel can be folded into them exactly
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, width, 3, padding=1),
            *(_Residual(width) for _ in range(decoder_blocks)),
            nn.Conv2d(width, 4 * fine_width, 3, padding=1),
            nn.PixelShuffle(2),
            *(_Residual(fine_width) for _ in range(fine_blocks)),
            nn.Conv2d(fine_width, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """The posterior of latents ``[batch, latent channels, height / 4, width / 4]``.

        Args:
            x: Images ``[batch, 3, height, width]`` in [-1, 1].
            return_dict: False returns a tuple.
        """
        posterior = DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple:
        """Images ``[batch, 3, height, width]``, about [-1, 1].

        Args:
            z: Latents.
            return_dict: False returns a tuple.
        """
        image = self.decoder(self.post_quant_conv(z))
        return DecoderOutput(sample=image) if return_dict else (image,)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        # the identity at first: without normalisation deep stacks need that
        for values in self.second.parameters():
            nn.init.zeros_(values)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))
