"""Paint-by-Example's image encoder: one CLIP vector of the reference becomes one context token."""

import os
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedModel

from i2am.files import read_json
from i2am.models.building import build_empty, configuration_of
from i2am.models.weights import load_strictly, read_state_dict
from i2am.wording import in_one_sentence


class PaintByExampleMapper(nn.Module):
    """Pre-norm transformer blocks with one head and GELU, one for every five encoder layers."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(width, 1, width, activation_fn="gelu", attention_bias=True)
            for _ in range((config.num_hidden_layers + 1) // 5)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[batch, tokens, width]`` to the same shape."""
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


class PaintByExampleImageEncoder(PreTrainedModel):
    """CLIP's pooled output through the mapper, a norm and a linear map.

    Parameter names are those of the public folder: ``model``, ``mapper.blocks``,
    ``final_layer_norm``, ``proj_out`` and ``uncond_vector``.

    Args:
        config: CLIP's vision configuration; ``projection_dim`` is the width of the context token.
    """

    config_class = CLIPVisionConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__(config)
        self.model = CLIPVisionModel(config)
        self.mapper = PaintByExampleMapper(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)
        self.proj_out = nn.Linear(config.hidden_size, config.projection_dim)
        self.uncond_vector = nn.Parameter(torch.randn(1, 1, config.projection_dim))
        self.post_init()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """The context of both halves of guidance.

        Args:
            pixel_values: ``[batch, 3, image_size, image_size]``, normalised with CLIP's mean and
                standard deviation.

        Returns:
            The conditional context ``[batch, 1, projection_dim]``, and the learned unconditional
            one expanded to the same shape.
        """
        pooled = self.model(pixel_values=pixel_values).pooler_output
        hidden = self.final_layer_norm(self.mapper(pooled[:, None]))
        return self.proj_out(hidden), self.uncond_vector.expand(len(pixel_values), -1, -1)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        **ignored: Any,
    ) -> Self:
        """Loads the encoder's folder, every tensor accounted for.

        Both generations of names are read: transformers 4 wrote ``model.vision_model.*`` and a
        buffer ``position_ids``, transformers 5 writes ``model.*``.

        Args:
            folder: Holds config.json and the weights, safetensors or .bin.
            dtype: Floating dtype of the weights; None keeps float32.
            variant: Middle part of the weight files' names.
            ignored: Options of transformers' loader that have no meaning here.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A file is damaged, the configuration makes no encoder, or tensors are
                missing, left over or misshapen.
        """
        dtype = dtype or torch.float32
        found = read_state_dict(folder, variant, dtype=dtype)
        state = {_current_name(key): values for key, values in found.items()}
        state.pop("model.embeddings.position_ids", None)
        file = Path(folder, "config.json")
        with in_one_sentence(f"{file} cannot be loaded as {cls.__name__}"):
            content = read_json(file)
            content = content.get("vision_config", content)  # of CLIP's both encoders
            config = configuration_of(CLIPVisionConfig, content, state)
            model = build_empty(lambda: cls(config), state)
        load_strictly(model, state, what=f"image encoder in {os.fspath(folder)}", dtype=dtype)
        return model.eval()


def _current_name(key: str) -> str:
    old = "model.vision_model."
    return "model." + key[len(old) :] if key.startswith(old) else key
