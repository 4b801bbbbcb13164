"""StableVITON: warp blocks that attend to a feature map, beside the UNet's single-token layers."""

import re
from typing import Any

from i2am.layouts.cross_attention import same_grid, single_token
from i2am.layouts.spans import Sequences
from i2am.layouts.token_layout import AttentionCall, Frame, TokenLayout, of_middle

# anchored: the spatial encoder has layers of these names too
WARP_LAYERS = r"^warp_blocks\.\d+\.transformer_blocks\.\d+\.attn2$"
ALL_LAYERS = (
    r"^(warp_blocks\.\d+|(down|up)_blocks\.\d+\.attentions\.\d+|mid_block\.attentions\.\d+)"
    r"\.transformer_blocks\.\d+\.attn2$"
)
NOTE = (
    "the warp blocks' reference keys mix garment and person: the spatial encoder they come from "
    "sees the garment's latents and the whole noisy input of the UNet"
)


def tags(layer: str) -> tuple[str, ...]:
    """``("warp:4",)`` for a layer of that warp block, ``("mid",)`` in the middle block."""
    warp = re.match(r"warp_blocks\.(\d+)\.", layer)
    return (f"warp:{warp[1]}",) if warp else of_middle(layer)


def warp_blocks(*, unet_layers: bool = False, **options: Any) -> TokenLayout:
    """See :meth:`TokenLayout.stableviton`."""
    warp, unet = same_grid(WARP_LAYERS), single_token()

    def spans(call: AttentionCall, frame: Frame) -> Sequences | None:
        return (warp if warp.matches(call.layer) else unet).spans(call, frame)

    layers = ALL_LAYERS if unet_layers else WARP_LAYERS
    defaults = {"layers": layers, "note": NOTE, "tags": tags}
    return TokenLayout("stableviton", spans, **{**defaults, **options})
