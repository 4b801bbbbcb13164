"""Names of the image encoders: CLIP with Paint-by-Example's mapper, and DINOv2 from its authors.

Every function takes the name of one tensor inside its network and returns the names it gets: one,
several where a fused projection is divided, none where the network has no such tensor.
"""

import functools
import re
from collections.abc import Mapping

_MAPPER = {
    "ln_1": "norm1",
    "attn.c_proj": "attn1.to_out.0",
    "ln_2": "norm3",
    "mlp.c_fc": "ff.net.0.proj",
    "mlp.c_proj": "ff.net.2",
}
_DINOV2 = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
# what transformers calls a layer: today's name first, then that of 5.0
_DINOV2_LAYER: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "norm1": (("norm1",),),
    "attn.qkv": (
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    ),
    "attn.proj": (("attention.o_proj",), ("attention.output.dense",)),
    "norm2": (("norm2",),),
    "mlp.w12": (("mlp.gate_proj", "mlp.up_proj"), ("mlp.weights_in",)),
    "mlp.w3": (("mlp.down_proj",), ("mlp.weights_out",)),
}
_DINOV2_SCALE = {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}


def mapper_keys(key: str) -> tuple[str, ...]:
    """Names in ``PaintByExampleMapper``, for names behind ``mapper.``."""
    found = re.fullmatch(r"resblocks\.(\d+)\.(.+)\.(weight|bias)", key)
    if not found:
        return ()
    number, layer, leaf = found.groups()
    block = f"blocks.{number}"
    if layer == "attn.c_qkv":
        return tuple(f"{block}.attn1.to_{name}.{leaf}" for name in "qkv")
    return (f"{block}.{_MAPPER[layer]}.{leaf}",) if layer in _MAPPER else ()


def dinov2_keys(key: str) -> tuple[str, ...]:
    """Names in the installed transformers' ``Dinov2Model`` with a SwiGLU feed-forward."""
    if key in _DINOV2:
        return (_DINOV2[key],)
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
    if not found:
        return ()
    number, rest = found.groups()
    block = f"encoder.layer.{number}"
    if rest in _DINOV2_SCALE:
        return (f"{block}.{_DINOV2_SCALE[rest]}",)
    layer, _, leaf = rest.rpartition(".")
    known = dinov2_layer_names()
    for names in _DINOV2_LAYER.get(layer, ()):
        if known.issuperset(names):
            return tuple(f"{block}.{name}.{leaf}" for name in names)
    return ()


@functools.cache
def dinov2_layer_names() -> frozenset[str]:
    """What the installed transformers calls the layers of one of DINOv2's blocks."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, use_swiglu_ffn=True
    )
    with torch.device("meta"):
        block = Dinov2Model(config).encoder.layer[0]
    return frozenset(name for name, _ in block.named_modules())
