"""Names of latent diffusion's code, in which the checkpoints were published, in diffusers' words.

Every function takes the name of one tensor inside its network and returns diffusers' name for it,
or None where the network has no such tensor. Four levels; two residual blocks each on the way down.
"""

import re

LEVELS = 4
LAYERS = 2

_TIME = {"0": "linear_1", "2": "linear_2"}
_OUT = {"0": "conv_norm_out", "2": "conv_out"}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")}
_VAE_RESNET["nin_shortcut"] = "conv_shortcut"
_VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_VAE_MIDDLE = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}


def unet_key(key: str) -> str | None:
    """Name in a ``UNet2DConditionModel``."""
    name, leaf = _split_leaf(key)
    match name.split("."):
        case ["time_embed", number] if number in _TIME:
            return f"time_embedding.{_TIME[number]}.{leaf}"
        case ["out", number] if number in _OUT:
            return f"{_OUT[number]}.{leaf}"
        case ["input_blocks", "0", "0"]:
            return f"conv_in.{leaf}"
        case ["input_blocks" | "output_blocks", block, *_] if not block.isdecimal():
            return None
        case ["input_blocks", block, "0", "op"]:
            return f"down_blocks.{_place(block, 1)[0]}.downsamplers.0.conv.{leaf}"
        case ["input_blocks", block, part, *rest]:
            level, layer = _place(block, 1)
            return _unet_part(f"down_blocks.{level}", layer, part, rest, leaf)
        case ["output_blocks", block, _, "conv"]:
            return f"up_blocks.{_place(block, 0)[0]}.upsamplers.0.conv.{leaf}"
        case ["output_blocks", block, part, *rest]:
            level, layer = _place(block, 0)
            return _unet_part(f"up_blocks.{level}", layer, part, rest, leaf)
        case ["middle_block", "0" | "2" as part, *rest]:
            return _unet_part("mid_block", int(part) // 2, "0", rest, leaf)
        case ["middle_block", "1", *rest]:
            return _unet_part("mid_block", 0, "1", rest, leaf)
    return None


def vae_key(key: str) -> str | None:
    """Name in an ``AutoencoderKL``."""
    name, leaf = _split_leaf(key)
    match name.split("."):
        case ["quant_conv" | "post_quant_conv"]:
            return key
        case ["encoder" | "decoder" as half, "conv_in" | "conv_out" as layer]:
            return f"{half}.{layer}.{leaf}"
        case ["encoder" | "decoder" as half, "norm_out"]:
            return f"{half}.conv_norm_out.{leaf}"
        case ["encoder" | "decoder" as half, "mid", part, layer] if part in _VAE_MIDDLE:
            names = _VAE_ATTENTION if part == "attn_1" else _VAE_RESNET
            return _joined(f"{half}.mid_block.{_VAE_MIDDLE[part]}", names.get(layer), leaf)
        case ["encoder", "down", level, "downsample", "conv"]:
            return f"encoder.down_blocks.{level}.downsamplers.0.conv.{leaf}"
        case ["encoder", "down", level, "block", block, layer]:
            block = f"encoder.down_blocks.{level}.resnets.{block}"
            return _joined(block, _VAE_RESNET.get(layer), leaf)
        # the decoder's levels are numbered from the image, diffusers counts from the latents
        case ["decoder", "up", level, "upsample", "conv"] if level.isdecimal():
            return f"decoder.up_blocks.{LEVELS - 1 - int(level)}.upsamplers.0.conv.{leaf}"
        case ["decoder", "up", level, "block", block, layer] if level.isdecimal():
            block = f"decoder.up_blocks.{LEVELS - 1 - int(level)}.resnets.{block}"
            return _joined(block, _VAE_RESNET.get(layer), leaf)
    return None


def is_vae_attention(key: str) -> bool:
    """Whether diffusers' VAE holds this weight of a 1x1 convolution as a linear layer's matrix."""
    return bool(re.search(r"\.attentions\.0\.to_.*\.weight$", key))


def _unet_part(block: str, layer: int, part: str, rest: list[str], leaf: str) -> str | None:
    """A tensor of a residual block (part 0) or of an attention block (part 1)."""
    inner = ".".join(rest)
    if part == "0":
        return _joined(f"{block}.resnets.{layer}", _UNET_RESNET.get(inner), leaf)
    return _joined(f"{block}.attentions.{layer}", inner if part == "1" else None, leaf)


def _place(block: str, first: int) -> tuple[int, int]:
    """Level and layer of a numbered block; the first level begins at `first`."""
    return divmod(int(block) - first, LAYERS + 1)


def _split_leaf(key: str) -> tuple[str, str]:
    name, _, leaf = key.rpartition(".")
    return name, leaf


def _joined(block: str, layer: str | None, leaf: str) -> str | None:
    return f"{block}.{layer}.{leaf}" if layer else None
