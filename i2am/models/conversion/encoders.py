"""Names of the image encoders: CLIP with Paint-by-Example's mapper, and DINOv2 from its authors.

Every function takes the name of one tensor inside its network and returns the names it gets: one,
several where a fused projection is divided, none where the network has no such tensor.
"""

import re

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
_DINOV2_LAYER = {
    "norm1": ("norm1",),
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": ("attention.o_proj",),
    "norm2": ("norm2",),
    "mlp.w12": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.w3": ("mlp.down_proj",),
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
    """Names in transformers' ``Dinov2Model`` with a SwiGLU feed-forward."""
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
    return tuple(f"{block}.{name}.{leaf}" for name in _DINOV2_LAYER.get(layer, ()))
