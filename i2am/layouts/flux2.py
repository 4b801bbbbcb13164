"""FLUX.2: ``[text | generated | references]``, as ``img_ids`` tell.

With a cache of the references (klein-KV) the first call has them before the generated tokens, the
later calls have them as keys alone and know nothing of their grids.
"""

from typing import Any

from torch import nn

from i2am.layouts.joint_tokens import (
    CAVEATS,
    Part,
    checked,
    known_reason,
    numbered,
    pictures_of,
    text_length,
)
from i2am.layouts.spans import GENERATED, REFERENCE, TEXT, Sequences, in_order, joint
from i2am.layouts.token_layout import AttentionCall, Encoder, Frame, TokenLayout

LAYERS = r"^(single_)?transformer_blocks\.\d+\.attn$"
PAINTED = "the first reference is the picture that is painted into; "

_PIPELINES = {
    "Flux2Pipeline": "",
    "Flux2KleinPipeline": "",
    "Flux2KleinInpaintPipeline": "",
    "Flux2KleinKVPipeline": "",
}
_CACHED = "references in the cache of FLUX.2"


def flux2(pipe: Any, denoiser: nn.Module) -> TokenLayout | None:
    """FLUX.2 dev and klein; ``None`` for pipelines of another order."""
    if known_reason(pipe, denoiser, _PIPELINES) is None:
        return None
    inpaints = any(cls.__name__ == "Flux2KleinInpaintPipeline" for cls in type(pipe).__mro__)
    return TokenLayout(
        "flux2",
        _spans,
        layers=LAYERS,
        note=PAINTED * inpaints + CAVEATS,
        encoders=(Encoder(),),
        sums="resized",
    )


def _spans(call: AttentionCall, frame: Frame) -> Sequences | None:
    text: Part = ("text", TEXT, (text_length(frame),))
    pictures = numbered(*pictures_of(frame))
    generated = [part for part in pictures if part[1] == GENERATED]
    mode = frame.arguments.get("kv_cache_mode")
    if mode == "extract":
        frame.run[_CACHED] = [part for part in pictures if part[1] == REFERENCE]
        if call.call_index == 1:  # the references among themselves
            return None
        found = Sequences(in_order(text, *generated), in_order(text, *pictures))
    elif mode == "cached" and frame.arguments.get("kv_cache") is not None:
        if _CACHED not in frame.run:
            raise ValueError(
                "layout must see the call of the denoiser that fills the cache of the references, "
                "got a run that is recorded from a later call on"
            )
        found = Sequences(
            in_order(text, *generated), in_order(text, *frame.run[_CACHED], *generated)
        )
    else:
        found = joint(text, *pictures)
    return checked(call, found)
