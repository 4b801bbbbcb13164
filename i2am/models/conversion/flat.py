"""Names of the custom model's checkpoint, which numbers its layers and fuses projections.

Its UNet and its autoencoder are those of latent diffusion under other names, so they are translated
into these, for `ldm` to go on with; several names stand for the equal parts of a fused projection.
"""

import re

_STAGES = {"encoders": "input_blocks", "decoders": "output_blocks", "bottleneck": "middle_block"}
_ROOTS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "final.groupnorm": "out.0",
    "final.conv": "out.2",
}
_RESNET = {
    "groupnorm_feature": "in_layers.0",
    "conv_feature": "in_layers.2",
    "linear_time": "emb_layers.1",
    "groupnorm_merged": "out_layers.0",
    "conv_merged": "out_layers.3",
    "residual_layer": "skip_connection",
}
_TRANSFORMER = {
    "layernorm_1": ("norm1",),
    "attention_1.in_proj": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attention_1.out_proj": ("attn1.to_out.0",),
    "layernorm_2": ("norm2",),
    "attention_2.q_proj": ("attn2.to_q",),
    "attention_2.k_proj": ("attn2.to_k",),
    "attention_2.v_proj": ("attn2.to_v",),
    "attention_2.out_proj": ("attn2.to_out.0",),
    "layernorm_3": ("norm3",),
    "linear_geglu_1": ("ff.net.0.proj",),
    "linear_geglu_2": ("ff.net.2",),
}
_ATTENTION_BLOCK = {"groupnorm": "norm", "conv_input": "proj_in", "conv_output": "proj_out"}
_PROJECTION = {"mlp.proj.0": "norm_in", "mlp.proj.2": "proj"}

# layers of the autoencoder by their number; None has no tensors: an activation, or enlarging
_VAE = {
    "encoder": (
        "conv_in",
        *("down.0.block.0", "down.0.block.1", "down.0.downsample.conv"),
        *("down.1.block.0", "down.1.block.1", "down.1.downsample.conv"),
        *("down.2.block.0", "down.2.block.1", "down.2.downsample.conv"),
        *("down.3.block.0", "down.3.block.1"),
        *("mid.block_1", "mid.attn_1", "mid.block_2"),
        *("norm_out", None, "conv_out", "quant_conv"),
    ),
    "decoder": (
        *("post_quant_conv", "conv_in"),
        *("mid.block_1", "mid.attn_1", "mid.block_2"),
        *("up.3.block.0", "up.3.block.1", "up.3.block.2", None, "up.3.upsample.conv"),
        *("up.2.block.0", "up.2.block.1", "up.2.block.2", None, "up.2.upsample.conv"),
        *("up.1.block.0", "up.1.block.1", "up.1.block.2", None, "up.1.upsample.conv"),
        *("up.0.block.0", "up.0.block.1", "up.0.block.2"),
        *("norm_out", None, "conv_out"),
    ),
}
_VAE_LAYERS = {
    "groupnorm_1": ("norm1",),
    "conv_1": ("conv1",),
    "groupnorm_2": ("norm2",),
    "conv_2": ("conv2",),
    "residual_layer": ("nin_shortcut",),
    "groupnorm": ("norm",),
    "attention.in_proj": ("q", "k", "v"),
    "attention.out_proj": ("proj_out",),
}


def unet_keys(key: str) -> tuple[str, ...]:
    """Latent diffusion's names of a tensor of the UNet, for names behind ``diffusion.``."""
    name, _, leaf = key.rpartition(".")
    if name in _ROOTS:
        return (f"{_ROOTS[name]}.{leaf}",)
    found = re.fullmatch(r"unet\.(encoders|decoders|bottleneck)\.(\d+)(\.\d+)?(?:\.(.+))?", name)
    if not found:
        return ()
    stage, number, part, layer = found.groups()
    block = f"{_STAGES[stage]}.{number}{part or ''}"
    if layer is None:  # a bare convolution: the first of all, or one that halves the grid
        return (f"{block}.{leaf}" if number == "0" else f"{block}.op.{leaf}",)
    if layer == "conv":
        return (f"{block}.conv.{leaf}",)
    if layer in _RESNET:
        return (f"{block}.{_RESNET[layer]}.{leaf}",)
    if layer in _ATTENTION_BLOCK:
        return (f"{block}.{_ATTENTION_BLOCK[layer]}.{leaf}",)
    return tuple(f"{block}.transformer_blocks.0.{x}.{leaf}" for x in _TRANSFORMER.get(layer, ()))


def projection_keys(key: str) -> tuple[str, ...]:
    """Names in ``ReferenceProjection``, for names that begin with ``mlp.``."""
    name, _, leaf = key.rpartition(".")
    if name in _PROJECTION:
        return (f"{_PROJECTION[name]}.{leaf}",)
    found = re.fullmatch(r"mlp\.proj\.1\.blocks\.(\d+)\.(.+)", name)
    if not found:
        return ()
    number, layer = found.groups()
    # without cross-attention the norm before the feed-forward is the second one, diffusers' third
    names = ("norm3",) if layer == "layernorm_2" else _TRANSFORMER.get(layer, ())
    return tuple(f"blocks.{number}.{x}.{leaf}" for x in names)


def vae_keys(key: str) -> tuple[str, ...]:
    """Latent diffusion's names of a tensor of the autoencoder."""
    found = re.fullmatch(r"(encoder|decoder)\.(\d+)(?:\.(.+))?\.(weight|bias)", key)
    if not found:
        return ()
    half, number, layer, leaf = found.groups()
    names = _VAE[half]
    name = names[int(number)] if int(number) < len(names) else None
    if name is None:
        return ()
    block = name if name.endswith("quant_conv") else f"{half}.{name}"
    if layer is None:
        return (f"{block}.{leaf}",)
    return tuple(f"{block}.{x}.{leaf}" for x in _VAE_LAYERS.get(layer, ()))
