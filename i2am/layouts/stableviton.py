"""StableVITON: warp blocks that attend to a feature map, beside the UNet's single-token layers."""

from typing import Any

from i2am.layouts.cross_attention import same_grid, single_token
from i2am.layouts.spans import Sequences
from i2am.layouts.token_layout import AttentionCall, Frame, TokenLayout

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


def warp_blocks(*, unet_layers: bool = False, **options: Any) -> TokenLayout:
    """See :meth:`TokenLayout.stableviton`."""
    warp, unet = same_grid(WARP_LAYERS), single_token()

    def spans(call: AttentionCall, frame: Frame) -> Sequences | None:
        return (warp if warp.matches(call.layer) else unet).spans(call, frame)

    defaults = {"layers": ALL_LAYERS if unet_layers else WARP_LAYERS, "note": NOTE}
    return TokenLayout("stableviton", spans, **{**defaults, **options})
