"""StableVITON's networks: Stable Diffusion's UNet, a spatial encoder, and warp blocks between."""

from copy import deepcopy
from inspect import signature
from typing import Any, ClassVar

import torch
from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

_SETTINGS = (
    "sample_size",
    "in_channels",
    "out_channels",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "attention_head_dim",
    "norm_num_groups",
    "hint_channels",
)


class SpatialEncoder(nn.Module):
    """The down and middle half of a UNet, which also sees the reference's latents.

    They are added behind the first convolution, to what the half makes of the whole noisy input:
    every feature mixes garment and person. Like a ControlNet it begins as a copy of the UNet's
    half, with a convolution of the hint that is zero.

    Args:
        unet: The UNet to copy.
        hint_channels: Channels of the reference's latents.
    """

    def __init__(self, unet: UNet2DConditionModel, hint_channels: int) -> None:
        super().__init__()
        self.time_embedding = deepcopy(unet.time_embedding)
        self.conv_in = deepcopy(unet.conv_in)
        self.hint_conv = _zeros(nn.Conv2d(hint_channels, unet.conv_in.out_channels, 3, padding=1))
        self.down_blocks = deepcopy(unet.down_blocks)
        self.mid_block = deepcopy(unet.mid_block)

    def forward(
        self,
        sample: Tensor,
        time: Tensor,
        encoder_hidden_states: Tensor,
        hint: Tensor,
        *,
        levels: int | None = None,
    ) -> list[Tensor]:
        """The features ``[samples, channels, h, w]``, one per skip connection of the UNet.

        Args:
            sample: The UNet's input.
            time: The timesteps' sinusoids, as `UNet2DConditionModel.get_time_embed` makes them.
            encoder_hidden_states: Cross-attention context, the UNet's.
            hint: Latents of the reference, of the grid of `sample`.
            levels: Stop behind that many down blocks; None goes on to the end and adds the
                middle block's output.
        """
        embedding = self.time_embedding(time)
        hidden = self.conv_in(sample) + self.hint_conv(hint)
        hidden, features = _go_down(
            self.down_blocks[:levels], hidden, embedding, encoder_hidden_states
        )
        if levels is None:
            features.append(self.mid_block(hidden, embedding, encoder_hidden_states))
        return features


class StableVITONUNet(UNet2DConditionModel):
    """Stable Diffusion's UNet, whose decoder attends to the features of a `SpatialEncoder`.

    In front of every residual block of the decoder but the deepest level's, a warp block (self-
    attention, cross-attention to the encoder's feature of the same place, feed-forward) changes
    the hidden state, before the skip connection is concatenated: its attention has as many keys
    as queries. Warp block ``i`` is ``warp_blocks.{i}``, numbered from the coarsest; published
    sizes have nine. Tensor names are those of diffusers, so a Stable Diffusion UNet is contained.

    Args:
        sample_size: (height, width) of the latents it is made for.
        in_channels: Noisy latents, agnostic latents, keep mask and pose latents.
        out_channels: Channels of the predicted noise.
        down_block_types: As in diffusers.
        up_block_types: As in diffusers.
        block_out_channels: Channels per level.
        layers_per_block: Residual blocks per level of the encoder.
        cross_attention_dim: Width of the context token.
        attention_head_dim: Number of heads (diffusers' old name), of the warp blocks too.
        norm_num_groups: Groups of all group norms.
        hint_channels: Channels of the reference's latents.

    Raises:
        ValueError: The sizes do not fit each other.
    """

    # what is not free stays out of the configuration too
    ignore_for_config: ClassVar[list[str]] = [
        name for name in signature(UNet2DConditionModel).parameters if name not in _SETTINGS
    ]
    # the decoder is walked through here, without diffusers' checkpoints
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = (64, 48),
        in_channels: int = 13,
        out_channels: int = 4,
        down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        cross_attention_dim: int = 768,
        attention_head_dim: int = 8,
        norm_num_groups: int = 32,
        hint_channels: int = 4,
    ) -> None:
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            cross_attention_dim=cross_attention_dim,
            attention_head_dim=attention_head_dim,
            norm_num_groups=norm_num_groups,
        )
        self.spatial_encoder = SpatialEncoder(self, hint_channels)
        self.warp_blocks = nn.ModuleList()
        self.warp_zero_convs = nn.ModuleList()
        skips = _skip_channels(self)
        for level, block in enumerate(self.up_blocks):
            for resnet in block.resnets:
                skip = skips.pop()
                if level == 0:
                    continue
                channels = resnet.in_channels - skip
                warp = Transformer2DModel(
                    num_attention_heads=attention_head_dim,
                    attention_head_dim=channels // attention_head_dim,
                    in_channels=channels,
                    cross_attention_dim=skip,
                    norm_num_groups=norm_num_groups,
                )
                _zeros(warp.proj_out)
                self.warp_blocks.append(warp)
                self.warp_zero_convs.append(_zeros(nn.Conv2d(channels, channels, 1)))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        hint: Tensor,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predicts noise ``[samples, out_channels, h, w]``.

        Args:
            sample: Noisy latents, agnostic latents, keep mask and pose latents,
                ``[samples, in_channels, h, w]``.
            timestep: One for all samples or one each.
            encoder_hidden_states: Context ``[samples, tokens, cross_attention_dim]`` of the UNet
                and of the spatial encoder.
            hint: Latents of the reference, ``[samples, hint_channels, h, w]``.
            return_dict: False returns a tuple.

        Raises:
            ValueError: The hint has another shape.
        """
        wanted = (len(sample), self.config.hint_channels, *sample.shape[2:])
        if tuple(hint.shape) != wanted:
            raise ValueError(f"hint must have shape {list(wanted)}, got {list(hint.shape)}")
        context = encoder_hidden_states
        time = self.get_time_embed(sample, timestep)
        # the deepest level has no warp block, so its features are not made
        levels = len(self.down_blocks) - 1
        features = self.spatial_encoder(sample, time, context, hint, levels=levels)

        embedding = self.time_embedding(time)
        hidden, skips = _go_down(self.down_blocks, self.conv_in(sample), embedding, context)
        hidden = self.mid_block(hidden, embedding, context)
        warps = iter(zip(self.warp_blocks, self.warp_zero_convs, strict=True))
        for level, block in enumerate(self.up_blocks):
            for index, resnet in enumerate(block.resnets):
                skip = skips.pop()
                if level > 0:
                    warp, zero_conv = next(warps)
                    keys = features[len(skips)].flatten(2).transpose(1, 2)
                    hidden = hidden + zero_conv(warp(hidden, keys, return_dict=False)[0])
                hidden = resnet(torch.cat([hidden, skip], dim=1), embedding)
                if hasattr(block, "attentions"):
                    hidden = block.attentions[index](hidden, context, return_dict=False)[0]
            for upsampler in block.upsamplers or ():
                # the size matters where a level's is odd
                hidden = upsampler(hidden, skips[-1].shape[2:])
        output = self.conv_out(self.conv_act(self.conv_norm_out(hidden)))
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)

    def enable_freeu(self, *scales: float, **named_scales: float) -> None:
        """Not available: FreeU changes decoder blocks that are not called as a whole here."""
        raise NotImplementedError(f"{type(self).__name__} does not support FreeU")


def _go_down(
    blocks: Any, hidden: Tensor, embedding: Tensor, context: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The last hidden state, and all of them from the first convolution on."""
    states = [hidden]
    for block in blocks:
        if getattr(block, "has_cross_attention", False):
            hidden, more = block(hidden, embedding, encoder_hidden_states=context)
        else:
            hidden, more = block(hidden, embedding)
        states.extend(more)
    return hidden, states


def _skip_channels(unet: UNet2DConditionModel) -> list[int]:
    """Channels of the skip connections, in the order in which the encoder makes them."""
    channels = [unet.conv_in.out_channels]
    for block in unet.down_blocks:
        channels += [resnet.out_channels for resnet in block.resnets]
        channels += [sampler.out_channels for sampler in block.downsamplers or ()]
    return channels


def _zeros(layer: Any) -> Any:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
