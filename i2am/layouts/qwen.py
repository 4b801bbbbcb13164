"""Qwen-Image and its editing: ``[text | generated | references]``, as ``img_shapes`` tell.

The text may hold padding, which is masked: no token attends to it.
"""

from typing import Any

from torch import nn

from i2am.layouts.joint_tokens import (
    CAVEATS,
    CONTROLNET,
    LATENTS,
    PROMPT,
    checked,
    known_reason,
    no_reference,
    numbered,
    refuse_references,
    text_length,
)
from i2am.layouts.spans import GENERATED, REFERENCE, TEXT, Sequences, joint
from i2am.layouts.token_layout import AttentionCall, Encoder, Frame, TokenLayout

LAYERS = r"^transformer_blocks\.\d+\.attn$"
LOOKED = "the text was encoded in view of the references, so that its tokens carry them too; "

_PIPELINES = {
    "QwenImagePipeline": PROMPT,
    "QwenImageImg2ImgPipeline": LATENTS,
    "QwenImageInpaintPipeline": LATENTS,
    "QwenImageControlNetPipeline": CONTROLNET,
    "QwenImageControlNetInpaintPipeline": CONTROLNET,
    "QwenImageEditPipeline": "",
    "QwenImageEditInpaintPipeline": "",
    "QwenImageEditPlusPipeline": "",
}


def qwen(pipe: Any, denoiser: nn.Module) -> TokenLayout | None:
    """Qwen-Image, -Edit and -Edit-Plus; ``None`` for layers of pictures and other pipelines."""
    reason = known_reason(pipe, denoiser, _PIPELINES)
    # a model of layered pictures generates several
    if reason is None or getattr(denoiser, "config", {}).get("use_layer3d_rope"):
        return None

    def spans(call: AttentionCall, frame: Frame) -> Sequences:
        generated, *references = _grids(frame)
        pictures = numbered((GENERATED, generated), *((REFERENCE, grid) for grid in references))
        refuse_references(pictures, reason)
        return checked(call, joint(("text", TEXT, (text_length(frame),)), *pictures))

    dropped = getattr(pipe, "prompt_template_encode_start_idx", 0)
    return TokenLayout(
        "qwen",
        spans,
        layers=LAYERS,
        note=LOOKED * (not reason) + CAVEATS,
        encoders=(Encoder(dropped=dropped),),
        no_reference=no_reference(pipe, reason),
        sums="resized",
    )


def _grids(frame: Frame) -> list[tuple[int, ...]]:
    first = frame.arguments["img_shapes"][0]
    # pipelines with a ControlNet give one shape for each sample
    shapes = [first] if isinstance(first[0], int) else first
    return [tuple(shape[1:]) if shape[0] == 1 else tuple(shape) for shape in shapes]
