"""Z-Image: ``[generated | text]`` of each sample, each padded to a multiple of 32 tokens.

Samples differ in length: the shorter are padded once more, and that padding is masked. The padding
to multiples of 32 is a learned token, which is attended to. Where samples are lists of pictures
the order is another, see :mod:`i2am.layouts.zimage_omni`.
"""

from typing import Any

from torch import nn

from i2am.layouts.joint_tokens import (
    ALONE,
    CAVEATS,
    CONTROLNET,
    LATENTS,
    PROMPT,
    checked,
    known_reason,
    no_reference,
)
from i2am.layouts.spans import GENERATED, OTHER, TEXT, Sequences, in_order
from i2am.layouts.token_layout import (
    CONDITIONAL,
    UNCONDITIONAL,
    AttentionCall,
    Encoder,
    Frame,
    TokenLayout,
)
from i2am.layouts.zimage_omni import MIXED, padded, patches, pieces

LAYERS = r"^layers\.\d+\.attention$"
PADDED = "padding to multiples of 32 tokens draws attention; "

_PIPELINES = {
    "ZImagePipeline": PROMPT,
    "ZImageImg2ImgPipeline": LATENTS,
    "ZImageInpaintPipeline": LATENTS,
    "ZImageControlNetPipeline": CONTROLNET,
    "ZImageControlNetInpaintPipeline": CONTROLNET,
    "ZImageOmniPipeline": "",
}


def zimage(pipe: Any, denoiser: nn.Module) -> TokenLayout | None:
    """Z-Image, -Turbo and -Omni; ``None`` for pipelines of another order."""
    reason = known_reason(pipe, denoiser, _PIPELINES)
    if reason is None:
        return None
    omni = not reason and getattr(denoiser, "siglip_embedder", None) is not None
    return TokenLayout(
        "zimage",
        _spans,
        layers=LAYERS,
        note=MIXED * omni + PADDED + CAVEATS,
        guidance_order=None if pipe is denoiser else (CONDITIONAL, UNCONDITIONAL),
        ragged=True,
        # the texts between pictures are rows of one call of the encoder
        encoders=() if omni else (Encoder(),),
        no_reference="" if omni else no_reference(pipe, reason or ALONE),
        sums="resized",
    )


def _spans(call: AttentionCall, frame: Frame) -> Sequences:
    latents = frame.arguments["x"][frame.row]
    if isinstance(latents, list):
        parts = list(pieces(frame))
    else:
        text = len(frame.arguments["cap_feats"][frame.row])
        parts = [("generated", GENERATED, patches(latents, frame)), ("text", TEXT, (text,))]
    found = in_order(*(part for piece in parts for part in padded(piece)))
    rest = call.seqlen_k - found[-1].stop
    found += in_order(("padding", OTHER, (max(rest, 0),)), start=found[-1].stop)
    return checked(call, Sequences(found, found))
