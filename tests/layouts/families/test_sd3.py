"""Stable Diffusion 3: the image first, then the texts of CLIP and T5; IP-Adapter's second call."""

import pytest
import torch

from i2am.layouts import AttentionCall, Encoder, Span
from i2am.layouts.registry import known_layout

TEXT, CLIP, IMAGE, ADAPTER = 12, 8, 5 * 7, 6
GENERATED = Span("generated", "generated", 0, (5, 7))
TEXTS = (
    Span("text", "text", IMAGE, (CLIP,)),
    Span("text 2", "text", IMAGE + CLIP, (TEXT - CLIP,)),
)
LAYERS = ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]


def watched(watch, model):
    with watch(model.denoiser) as watching:
        model()
    return watching.of(known_layout(model.pipe, model.denoiser))


def test_spans(watch, tiny):
    found = watched(watch, tiny("sd3"))
    expected = (GENERATED, *TEXTS)
    # the attention of dual layers to the generated tokens alone is left out
    assert [each.call.layer for each, _ in found] == LAYERS * 2
    assert {sequences for _, sequences in found} == {(expected, expected)}


def test_adapter_is_a_second_call(watch, tiny):
    model = tiny("sd3", adapter=True)
    found = watched(watch, model)
    adapter = Span("reference", "reference", IMAGE, (ADAPTER,))
    joint = (GENERATED, *TEXTS)
    both = [(joint, joint), ((GENERATED,), (GENERATED, adapter))]
    assert [sequences for _, sequences in found] == both * len(LAYERS) * 2
    assert known_layout(model.pipe, model.denoiser).no_reference == ""


def test_odd_sizes_are_floored(watch, tiny):
    """13x21 latents are 6x10 tokens."""
    model = tiny("sd3")
    layout = known_layout(model.pipe, model.denoiser)
    with watch(model.denoiser) as watching, torch.no_grad():
        model.denoiser(
            torch.ones(1, 4, 13, 21), torch.ones(1, TEXT, 32), torch.ones(1, 24), torch.ones(1)
        )
    assert watching.of(layout)[0][1].generated == Span("generated", "generated", 0, (6, 10))


def test_keys_move_with_their_span_alone(watch, tiny, moved, noise):
    model = tiny("sd3")
    with watch(model.denoiser) as watching:
        model()
    arguments = watching.seen[0].frame.arguments

    def upper_rows(given):
        latents = given["hidden_states"].clone()
        latents[:, :, :4] += 1  # of the 10 rows of latents
        return given | {"hidden_states": latents}

    assert moved(model.denoiser, arguments, upper_rows) == list(range(2 * 7))
    for span, change in zip(
        TEXTS,
        (noise("encoder_hidden_states", 0, CLIP), noise("encoder_hidden_states", CLIP, TEXT)),
        strict=True,
    ):
        positions = moved(model.denoiser, arguments, change)
        assert positions == list(range(span.start, span.stop))


def test_keys_of_the_adapter_move_with_its_picture(watch, tiny, moved):
    model = tiny("sd3", adapter=True)
    with watch(model.denoiser) as watching:
        model()
    arguments = watching.seen[0].frame.arguments

    def change(given):
        attention = given["joint_attention_kwargs"]
        images = attention["ip_adapter_image_embeds"] + 1
        return given | {"joint_attention_kwargs": attention | {"ip_adapter_image_embeds": images}}

    assert moved(model.denoiser, arguments, change, index=0) == []
    positions = moved(model.denoiser, arguments, change, index=1, row=1)
    assert positions == list(range(IMAGE, IMAGE + ADAPTER))


@pytest.mark.parametrize("length", [CLIP, 3])
def test_text_of_clip_alone(watch, tiny, length):
    model = tiny("sd3")
    with watch(model.denoiser) as watching:
        embeds = {
            name: model.inputs[name][:, :length]
            for name in ("prompt_embeds", "negative_prompt_embeds")
        }
        model(**embeds)
    found = watching.of(known_layout(model.pipe, model.denoiser))
    assert found[0][1].key == (GENERATED, Span("text", "text", IMAGE, (length,)))


def test_bare_denoiser_does_not_tell_the_texts_apart(watch, tiny):
    model = tiny("sd3")
    layout = known_layout(model.denoiser, model.denoiser)
    with watch(model.denoiser) as watching:
        model()
    assert watching.of(layout)[0][1].key == (GENERATED, Span("text", "text", IMAGE, (TEXT,)))
    assert layout.encoders == ()
    reason = "its tokens are those of the generated image and of the text"
    assert layout.no_reference == f"SD3Transformer2DModel has no reference tokens: {reason}"


def test_words_are_those_of_three_encoders(tiny):
    """Also where the pipeline is without some: their span holds zeros."""
    model = tiny("sd3")
    layout = known_layout(model.pipe, model.denoiser)
    assert layout.encoders == (
        Encoder(),
        Encoder("text_encoder_2", "tokenizer_2"),
        Encoder("text_encoder_3", "tokenizer_3", "text 2"),
    )


def test_second_calls_without_an_adapter_are_refused(watch, tiny):
    model, plain = tiny("sd3", adapter=True), tiny("sd3")
    with watch(model.denoiser) as watching:
        model()
    with pytest.raises(ValueError, match="expects 1 attention call of a layer, got call 2 of"):
        watching.of(known_layout(plain.pipe, plain.denoiser))


def test_adapter_without_tokens_is_refused(watch, tiny):
    model = tiny("sd3", adapter=True)
    with watch(model.denoiser) as watching:
        model()
    call = AttentionCall(LAYERS[0], 1, IMAGE, IMAGE)
    with pytest.raises(ValueError, match=r"35 generated \+ 1 reference = 36 keys, got 35 in"):
        known_layout(model.pipe, model.denoiser).spans(call, watching.seen[0].frame)
