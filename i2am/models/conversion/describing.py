"""What a checkpoint is a checkpoint of: sizes from its tensors' shapes, then empty pipelines."""

from collections.abc import Mapping
from importlib import import_module
from math import isqrt
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from transformers import CLIPVisionConfig, Dinov2Config

from i2am.models.base import ReferencePipeline
from i2am.models.configuration import STABLE_DIFFUSION_BETAS
from i2am.models.conversion.ldm import LAYERS, LEVELS
from i2am.models.projection import ReferenceProjection
from i2am.wording import in_one_sentence

Shapes = Mapping[str, tuple[int, ...]]

# module and class, input channels of the UNet, (height, width) of the latents
_PIPELINES: Mapping[str, tuple[str, str, int, tuple[int, int]]] = {
    "paint-by-example": ("paint_by_example", "PaintByExamplePipeline", 9, (64, 64)),
    "dci-vton": ("dci_vton", "DCIVTONPipeline", 9, (64, 64)),
    "stableviton": ("stableviton", "StableVITONPipeline", 13, (64, 48)),
    "custom": ("custom", "CustomPipeline", 12, (64, 48)),
}
HEADS = 8
"""Of the UNet's attention; shapes do not tell."""
HEAD_WIDTH = 64
"""Of the image encoders', both vision transformers."""


def empty_pipeline(system: str, shapes: Mapping[str, Shapes]) -> ReferencePipeline:
    """The pipeline that the shapes belong to, without values: its modules are on torch's meta.

    A size that cannot be seen, because its tensor is missing or has other axes, is the published
    one; so is everything that is no size.

    Args:
        system: One of the four.
        shapes: Shapes of the converted tensors by name, by component.

    Raises:
        ValueError: No network can have these sizes.
    """
    module, name, channels, cells = _PIPELINES[system]
    pipeline_class: Any = getattr(import_module(f"i2am.models.{module}"), name)
    classes = pipeline_class.component_classes
    of = {component: shapes.get(component, {}) for component in classes}
    # of the weights: which of their noise schedule's steps are sampled is chosen below
    components: dict[str, Any] = {"scheduler": DDIMScheduler(**STABLE_DIFFUSION_BETAS)}
    options: dict[str, Any] = {}
    what = f"the sizes of the tensors make no {name}"
    with in_one_sentence(what), torch.device("meta"):
        components["vae"] = AutoencoderKL(**_vae(of["vae"]))
        components["unet"] = classes["unet"](**_unet(of["unet"], channels, cells))
        if system == "custom":
            components["image_proj"] = ReferenceProjection(**_projection(of["image_proj"]))
            config = Dinov2Config(**_dinov2(of["image_encoder"]))
            components["image_encoder"] = classes["image_encoder"](config)
            options["reference_size"] = _reference_size(config, components["image_proj"])
        else:
            config = CLIPVisionConfig(**_clip(of["image_encoder"]))
            components["image_encoder"] = classes["image_encoder"](config)
    with in_one_sentence(what):
        pipeline = pipeline_class(**components, **options)
    pipeline.use_sampler("paper")
    return pipeline


def _unet(shapes: Shapes, channels: int, cells: tuple[int, int]) -> dict[str, Any]:
    levels = zip(range(LEVELS), (320, 640, 1280, 1280), strict=True)
    return {
        "sample_size": cells,
        "in_channels": channels,
        "out_channels": 4,
        "block_out_channels": tuple(
            _size(shapes, f"down_blocks.{level}.resnets.0.conv1.weight", 0, published)
            for level, published in levels
        ),
        "layers_per_block": LAYERS,
        "cross_attention_dim": _size(
            shapes, "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight", 1, 768
        ),
        "attention_head_dim": HEADS,  # diffusers' old name
    }


def _vae(shapes: Shapes) -> dict[str, Any]:
    levels = zip(range(LEVELS), (128, 256, 512, 512), strict=True)
    return {
        "block_out_channels": tuple(
            _size(shapes, f"encoder.down_blocks.{level}.resnets.0.conv1.weight", 0, published)
            for level, published in levels
        ),
        "down_block_types": ("DownEncoderBlock2D",) * LEVELS,
        "up_block_types": ("UpDecoderBlock2D",) * LEVELS,
        "layers_per_block": LAYERS,
        "latent_channels": 4,
        "sample_size": 512,
        "scaling_factor": 0.18215,
    }


def _clip(shapes: Shapes) -> dict[str, Any]:
    width = _size(shapes, "model.embeddings.class_embedding", 0, 1024)
    patch = _size(shapes, "model.embeddings.patch_embedding.weight", 2, 14)
    positions = _size(shapes, "model.embeddings.position_embedding.weight", 0, 257)
    feed_forward = "model.encoder.layers.0.mlp.fc1.weight"
    return {
        "hidden_size": width,
        "intermediate_size": _size(shapes, feed_forward, 0, 4096),
        "num_hidden_layers": _count(shapes, "model.encoder.layers.", 24),
        "num_attention_heads": max(width // HEAD_WIDTH, 1),
        "hidden_act": "quick_gelu",
        "patch_size": patch,
        "image_size": isqrt(positions - 1) * patch,
        "projection_dim": _size(shapes, "proj_out.weight", 0, 768),
    }


def _dinov2(shapes: Shapes) -> dict[str, Any]:
    width = _size(shapes, "embeddings.cls_token", 2, 1536)
    patch = _size(shapes, "embeddings.patch_embeddings.projection.weight", 2, 14)
    positions = _size(shapes, "embeddings.position_embeddings", 1, 1370)
    return {
        "hidden_size": width,
        "num_hidden_layers": _count(shapes, "encoder.layer.", 40),
        "num_attention_heads": max(width // HEAD_WIDTH, 1),
        "mlp_ratio": 4,
        "use_swiglu_ffn": True,
        "patch_size": patch,
        "image_size": isqrt(positions - 1) * patch,
    }


def _projection(shapes: Shapes) -> dict[str, Any]:
    return {
        "width": _size(shapes, "norm_in.weight", 0, 1536),
        "context_width": _size(shapes, "proj.weight", 0, 768),
        "tokens": _size(shapes, "uncond_vector", 1, 1037),
        "layers": _count(shapes, "blocks.", 3),
    }


def _reference_size(encoder: Dinov2Config, projection: ReferenceProjection) -> tuple[int, int]:
    """(height, width) in pixels: as high as the encoder was made for, as wide as the tokens say."""
    rows, patches = encoder.image_size // encoder.patch_size, projection.config.tokens - 1
    if patches % rows:
        raise ValueError(f"{patches} reference patches do not make {rows} rows")
    return encoder.image_size, patches // rows * encoder.patch_size


def _size(shapes: Shapes, key: str, axis: int, published: int) -> int:
    shape = shapes.get(key, ())
    return shape[axis] if axis < len(shape) else published


def _count(shapes: Shapes, prefix: str, published: int) -> int:
    """How many numbered layers there are."""
    numbers = {key[len(prefix) :].split(".")[0] for key in shapes if key.startswith(prefix)}
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=published)
