"""FLUX.1 and Chroma: ``[text | generated | references]``, as ``img_ids`` tell.

Each IP-Adapter adds a call after the joint one: the queries are the pictures, the keys the tokens
of its images. Tokens of Redux lie among those of the text, where nothing tells them apart.
"""

from typing import Any

from torch import Tensor, nn

from i2am.layouts.joint_tokens import (
    CAVEATS,
    CHANNELS,
    CONTROLNET,
    LATENTS,
    PROMPT,
    checked,
    known_reason,
    no_reference,
    numbered,
    pictures_of,
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
    return _layout("flux", reason, pipe, denoiser, encoder, note=REDUX + CAVEATS)


def chroma(pipe: Any, denoiser: nn.Module) -> TokenLayout | None:
    """Chroma; ``None`` for pipelines of another order."""
    reason = known_reason(pipe, denoiser, _CHROMA)
    return _layout("chroma", reason, pipe, denoiser, Encoder(), note=CAVEATS)


def _layout(
    name: str, reason: str | None, pipe: Any, denoiser: nn.Module, encoder: Encoder, note: str
) -> TokenLayout | None:
    if reason is None:
        return None
    loaded = getattr(denoiser, "encoder_hid_proj", None) is not None

    def spans(call: AttentionCall, frame: Frame) -> Sequences:
        pictures, images = pictures_of(frame), _images(frame)
        refuse_references(numbered(*pictures), reason)
        unplaced = [(REFERENCE, (1,))] * sum(images)
        named = numbered(*pictures, *unplaced)
        own, others = named[: len(pictures)], named[len(pictures) :]
        if call.call_index == 0:
            found = joint(("text", TEXT, (text_length(frame),)), *own)
        else:
            adapter = slice(sum(images[: call.call_index - 1]), sum(images[: call.call_index]))
            tokens = call.seqlen_k // max(len(others[adapter]), 1)
            keys = [(name, role, (tokens,)) for name, role, _ in others[adapter]]
            found = Sequences(in_order(*own), in_order(*keys))
        return checked(call, found, calls=1 + len(images))

    return TokenLayout(
        name,
        spans,
        layers=LAYERS,
        note=note,
        encoders=(encoder,),
        no_reference="" if loaded else no_reference(pipe, reason),
        sums="resized",
    )


def _images(frame: Frame) -> list[int]:
    """How many images each IP-Adapter was given."""
    given = frame.arguments.get("joint_attention_kwargs") or {}
    # the denoiser may have put the one in place of the other
    embeds = given.get("ip_adapter_image_embeds", given.get("ip_hidden_states"))
    if isinstance(embeds, Tensor):
        return [1]
    return [each.shape[1] for each in embeds or ()]
