"""FLUX.1 and Chroma: ``[text | generated | references]``, as ``img_ids`` tell.

IP-Adapter adds calls after the joint one: the queries are the pictures, the keys an adapter's
tokens. Tokens of Redux lie among those of the text, where nothing tells them apart.
"""

from typing import Any

from torch import nn

from i2am.layouts.joint_tokens import (
    CAVEATS,
    CHANNELS,
    CONTROLNET,
    LATENTS,
    PROMPT,
    checked,
    known_reason,
    picture_parts,
    refuse_references,
    text_length,
)
from i2am.layouts.spans import REFERENCE, TEXT, Sequences, in_order, joint
from i2am.layouts.token_layout import AttentionCall, Encoder, Frame, TokenLayout

LAYERS = r"^(single_)?transformer_blocks\.\d+\.attn$"
REDUX = "tokens of Redux, if there are some, are taken for text; "

_FLUX = {
    "FluxPipeline": PROMPT,
    "FluxKontextPipeline": "",
    "FluxKontextInpaintPipeline": "",
    "FluxImg2ImgPipeline": LATENTS,
    "FluxInpaintPipeline": LATENTS,
    "FluxFillPipeline": CHANNELS,
    "FluxControlPipeline": CHANNELS,
    "FluxControlImg2ImgPipeline": CHANNELS,
    "FluxControlInpaintPipeline": CHANNELS,
    "FluxControlNetPipeline": CONTROLNET,
    "FluxControlNetImg2ImgPipeline": CONTROLNET,
    "FluxControlNetInpaintPipeline": CONTROLNET,
}
_CHROMA = {
    "ChromaPipeline": PROMPT,
    "ChromaImg2ImgPipeline": LATENTS,
    "ChromaInpaintPipeline": LATENTS,
}


def flux(pipe: Any, denoiser: nn.Module) -> TokenLayout | None:
    """FLUX.1: dev, schnell, Kontext, Fill, Control; ``None`` for pipelines of another order."""
    # the first encoder's tokens are pooled
    encoder = Encoder("text_encoder_2", "tokenizer_2")
    reason = known_reason(pipe, denoiser, _FLUX)
    return _layout("flux", reason, denoiser, encoder, note=REDUX + CAVEATS)


def chroma(pipe: Any, denoiser: nn.Module) -> TokenLayout | None:
    """Chroma; ``None`` for pipelines of another order."""
    reason = known_reason(pipe, denoiser, _CHROMA)
    return _layout("chroma", reason, denoiser, Encoder(), note=CAVEATS)


def _layout(
    name: str, reason: str | None, denoiser: nn.Module, encoder: Encoder, note: str
) -> TokenLayout | None:
    if reason is None:
        return None
    adapters = getattr(denoiser, "encoder_hid_proj", None)
    count = len(getattr(adapters, "image_projection_layers", ()))

    def spans(call: AttentionCall, frame: Frame) -> Sequences:
        pictures = picture_parts(frame)
        refuse_references(pictures, reason)
        if call.call_index == 0:
            found = joint(("text", TEXT, (text_length(frame),)), *pictures)
        else:
            adapter = (f"adapter {call.call_index}", REFERENCE, (call.seqlen_k,))
            found = Sequences(in_order(*pictures), in_order(adapter))
        return checked(call, found, calls=1 + count)

    return TokenLayout(
        name,
        spans,
        layers=LAYERS,
        note=note,
        encoders=(encoder,),
        no_reference="" if count else reason,
        sums="resized",
    )
