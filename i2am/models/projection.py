"""The network between the reference encoder and the UNet of the custom model."""

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn


class ReferenceProjection(ModelMixin, ConfigMixin):
    """Turns all tokens of the reference encoder into the UNet's cross-attention context.

    LayerNorm, then pre-norm transformer blocks (self-attention with one head, GEGLU feed-forward
    of four times the width), then a linear map to the context width. The learned context of the
    unconditional half of guidance, one vector per token, lives here too, so that it is saved with
    the projection.

    Args:
        width: Channels of the encoder's tokens.
        context_width: Channels of the UNet's context.
        tokens: Number of tokens, class token included: 1 + patch rows * patch columns.
        layers: Number of transformer blocks.
    """

    @register_to_config
    def __init__(
        self,
        width: int = 1536,
        context_width: int = 768,
        tokens: int = 1037,
        layers: int = 3,
    ) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(width, 1, width, activation_fn="geglu") for _ in range(layers)
        )
        self.proj = nn.Linear(width, context_width)
        self.uncond_vector = nn.Parameter(torch.randn(1, tokens, context_width))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The context of both halves of guidance.

        Args:
            tokens: Encoder tokens ``[batch, tokens, width]``, class token first.

        Returns:
            The conditional context ``[batch, tokens, context_width]``, and the unconditional one
            expanded to the same shape.

        Raises:
            ValueError: The number of tokens is not the configured one.
        """
        if tokens.shape[1] != self.config.tokens:
            raise ValueError(
                f"tokens must hold {self.config.tokens} tokens per reference image, "
                f"got {tokens.shape[1]}"
            )
        hidden = self.norm_in(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.proj(hidden), self.uncond_vector.expand(len(tokens), -1, -1)
