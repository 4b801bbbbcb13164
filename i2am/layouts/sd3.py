"""Stable Diffusion 3 and 3.5: ``[generated | text of CLIP | text of T5]``.

IP-Adapter adds a call of ``[generated | adapter]`` keys. The second attention of dual layers sees
the generated tokens alone and is left out.
"""

from typing import Any

from torch import nn

from i2am.layouts.joint_tokens import (
    ALONE,
    CAVEATS,
    CONTROLNET,
    LATENTS,
    PROMPT,
    Part,
    checked,
    known_reason,
    no_reference,
    text_length,
)
from i2am.layouts.spans import GENERATED, REFERENCE, TEXT, Sequences, in_order, joint
from i2am.layouts.token_layout import AttentionCall, Encoder, Frame, TokenLayout

LAYERS = r"^transformer_blocks\.\d+\.attn$"

# not with perturbed attention, whose layers attend twice
_PIPELINES = {
    "StableDiffusion3Pipeline": PROMPT,
    "StableDiffusion3Img2ImgPipeline": LATENTS,
    "StableDiffusion3InpaintPipeline": LATENTS,
    "StableDiffusion3ControlNetPipeline": CONTROLNET,
    "StableDiffusion3ControlNetInpaintingPipeline": CONTROLNET,
}
# the two CLIP encoders share positions; without T5 its span holds zeros
_ENCODERS = (
    Encoder(),
    Encoder("text_encoder_2", "tokenizer_2"),
    Encoder("text_encoder_3", "tokenizer_3", span="text 2"),
)


def sd3(pipe: Any, denoiser: nn.Module) -> TokenLayout | None:
    """Stable Diffusion 3 and 3.5; ``None`` for pipelines of another order."""
    reason = known_reason(pipe, denoiser, _PIPELINES)
    if reason is None:
        return None
    clip = getattr(pipe, "tokenizer_max_length", None)
    adapter = getattr(denoiser, "image_proj", None) is not None

    def spans(call: AttentionCall, frame: Frame) -> Sequences:
        patch = frame.config["patch_size"]
        height, width = frame.arguments["hidden_states"].shape[-2:]
        generated: Part = ("generated", GENERATED, (height // patch, width // patch))
        if call.call_index == 0:
            found = joint(generated, *_text(text_length(frame), clip))
        else:
            query = in_order(generated)
            tokens = max(call.seqlen_k - query[0].stop, 1)
            found = Sequences(query, in_order(generated, ("reference", REFERENCE, (tokens,))))
        return checked(call, found, calls=1 + adapter)

    return TokenLayout(
        "sd3",
        spans,
        layers=LAYERS,
        note=CAVEATS,
        encoders=() if clip is None else _ENCODERS,
        no_reference="" if adapter else no_reference(pipe, reason or ALONE),
        sums="resized",
    )


def _text(length: int, clip: int | None) -> list[Part]:
    """The tokens of CLIP, then those of T5; one span where embeddings of one's own are shorter."""
    if clip is None or length <= clip:
        return [("text", TEXT, (length,))]
    return [("text", TEXT, (clip,)), ("text 2", TEXT, (length - clip,))]
