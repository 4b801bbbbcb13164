"""Z-Image: ``[generated | text]`` of each sample, each padded to a multiple of 32 tokens.

Samples differ in length: the shorter are padded once more, and that padding is masked. The padding
to multiples of 32 is a learned token, which is attended to.
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
)
from i2am.layouts.spans import GENERATED, OTHER, TEXT, Sequences, joint
from i2am.layouts.token_layout import (
    CONDITIONAL,
    UNCONDITIONAL,
    AttentionCall,
    Encoder,
    Frame,
    TokenLayout,
)

LAYERS = r"^layers\.\d+\.attention$"
MULTIPLE = 32
PADDED = "padding of the generated tokens to a multiple of 32 draws attention; "

# not the one of several pictures, whose references were mixed with the image before these layers
_PIPELINES = {
    "ZImagePipeline": PROMPT,
    "ZImageImg2ImgPipeline": LATENTS,
    "ZImageInpaintPipeline": LATENTS,
    "ZImageControlNetPipeline": CONTROLNET,
    "ZImageControlNetInpaintPipeline": CONTROLNET,
}


def zimage(pipe: Any, denoiser: nn.Module) -> TokenLayout | None:
    """Z-Image and -Turbo; ``None`` for pipelines of another order."""
    reason = known_reason(pipe, denoiser, _PIPELINES)
    if reason is None:
        return None
    return TokenLayout(
        "zimage",
        _spans,
        layers=LAYERS,
        note=PADDED + CAVEATS,
        guidance_order=None if pipe is denoiser else (CONDITIONAL, UNCONDITIONAL),
        ragged=True,
        encoders=(Encoder(),),
        no_reference=reason or ALONE,
        sums="resized",
    )


def _spans(call: AttentionCall, frame: Frame) -> Sequences:
    given = frame.arguments
    latents = given["x"][frame.row]
    if isinstance(latents, list):
        raise ValueError(
            "layout expects one picture for each sample of Z-Image, got several, whose tokens are "
            "mixed before the layers that are recorded"
        )
    patches = (given.get("f_patch_size") or 1, *(given.get("patch_size") or 2,) * 2)
    grid = tuple(side // patch for side, patch in zip(latents.shape[1:], patches, strict=True))
    image, text = grid[0] * grid[1] * grid[2], len(given["cap_feats"][frame.row])
    rest = call.seqlen_k - image - -image % MULTIPLE - text
    return checked(
        call,
        joint(
            ("generated", GENERATED, grid[1:] if grid[0] == 1 else grid),
            ("image padding", OTHER, (-image % MULTIPLE,)),
            ("text", TEXT, (text,)),
            ("text padding", OTHER, (max(rest, -text % MULTIPLE),)),
        ),
    )
