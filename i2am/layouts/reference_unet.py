"""Try-on by a second UNet for the garment: IDM-VTON and OOTDiffusion.

The second UNet's features are appended to the tokens of every self-attention of the first, level by
level; what comes out for them is dropped.
"""

from typing import Any

from torch import nn

from i2am.layouts import text
from i2am.layouts.cross_attention import unet_layers
from i2am.layouts.spans import Sequences, in_order
from i2am.layouts.token_layout import (
    CONDITIONAL,
    UNCONDITIONAL,
    AttentionCall,
    Frame,
    TokenLayout,
)

NOTE = (
    "the reference tokens are features of a second UNet, which sees the reference picture alone; "
    "cross-attention, to the text and to an IP-Adapter's tokens, is not recorded"
)


def appended_features(**options: Any) -> TokenLayout:
    """Self-attention of a UNet, ``[generated | reference]``, both on the grid of the level.

    Queries are both, or the generated tokens alone.

    Args:
        **options: Those of :class:`TokenLayout`.
    """
    defaults = {"layers": unet_layers("attn1"), "note": NOTE}
    return TokenLayout("reference_unet", _spans, **{**defaults, **options})


def _spans(call: AttentionCall, frame: Frame) -> Sequences | None:
    tokens, rest = divmod(call.seqlen_k, 2)
    if rest or call.seqlen_q not in (tokens, call.seqlen_k):
        raise ValueError(
            "layout expects as many reference as generated tokens among the keys, and those or "
            f"the generated ones as queries, got {call.seqlen_q} queries and {call.seqlen_k} keys "
            f"in {call.layer}"
        )
    grid = frame.level_grid(tokens, call.layer)
    if grid is None:
        return None
    key = in_order(("generated", "generated", grid), ("reference", "reference", grid))
    return Sequences(key if call.seqlen_q == call.seqlen_k else key[:1], key)


def idm_vton(pipe: Any, denoiser: nn.Module) -> TokenLayout | None:
    """IDM-VTON's pipeline has the name of diffusers' that it is based on, and one UNet more."""
    if getattr(pipe, "unet_encoder", None) is None:
        return text.inpainting(pipe, denoiser)
    return appended_features()


def ootdiffusion(pipe: Any, denoiser: nn.Module) -> TokenLayout | None:
    """OOTDiffusion: text and garment come before text alone in its batch."""
    return appended_features(guidance_order=(CONDITIONAL, UNCONDITIONAL))
