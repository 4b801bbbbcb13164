"""Words of Stable Diffusion, SDXL and Kolors: UNet cross-attention to the tokens of a prompt."""

from dataclasses import replace
from typing import Any

from torch import nn

from i2am.layouts import ip_adapter
from i2am.layouts.cross_attention import generated_tokens, unet_layers
from i2am.layouts.registry import Make
from i2am.layouts.spans import Sequences, in_order
from i2am.layouts.token_layout import AttentionCall, Encoder, Frame, TokenLayout

NOTE = (
    "the prompt is padded to the length of the text, and the padding is attended to like any word"
)
LAYERS = unet_layers("attn2")


def words(encoders: tuple[Encoder, ...] = (), **options: Any) -> TokenLayout:
    """Keys are the tokens of a text alone; adapters' calls behind that of the text are left out.

    Args:
        encoders: Whose tokens they are.
        **options: Those of :class:`TokenLayout`.
    """
    defaults = {"layers": LAYERS, "note": NOTE, "context_keys": True, "encoders": encoders}
    return TokenLayout("text", _spans, **{**defaults, **options})


def _spans(call: AttentionCall, frame: Frame) -> Sequences | None:
    if call.call_index:
        return None
    generated = generated_tokens(call, frame)
    if generated is None:
        return None
    return Sequences(generated, in_order(("text", "text", (call.seqlen_k,))))


def _encoders(pipe: Any) -> tuple[Encoder, ...]:
    # the tokens of SDXL's two encoders lie at the same positions: their channels are joined
    found = (Encoder(), Encoder("text_encoder_2", "tokenizer_2"))
    return tuple(
        encoder
        for encoder in found
        if None
        not in (getattr(pipe, name, None) for name in (encoder.component, encoder.tokenizer))
    )


def _layout_of(why: str) -> Make:
    """Words, and the images of IP-Adapters where some are loaded; else `why` there are none."""

    def make(pipe: Any, denoiser: nn.Module) -> TokenLayout:
        text = words(_encoders(pipe), no_reference=f"{type(pipe).__name__} {why}")
        images = ip_adapter.known(pipe, denoiser)
        if images is None:
            return text

        def spans(call: AttentionCall, frame: Frame) -> Sequences | None:
            return (images if call.call_index else text).spans(call, frame)

        return replace(images, spans=spans, layers=text.layers, note=NOTE, encoders=text.encoders)

    return make


text_to_image = _layout_of("has no reference image")
image_to_image = _layout_of(
    "has no reference tokens: its image is what the run starts from, which attention does not see "
    "apart from the generated image"
)
inpainting = _layout_of(
    "has no reference tokens: its image enters as latents and input channels, which attention does "
    "not see apart from the generated image"
)
image_in_channels = _layout_of(
    "has no reference tokens: its image enters as input channels, which attention does not see"
)
control = _layout_of(
    "has no reference tokens: its control image enters as features that are added to the "
    "generated image's own, which attention does not see apart"
)
