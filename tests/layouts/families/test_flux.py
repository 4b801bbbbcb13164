"""FLUX.1 and Chroma: text, generated tokens, references; the calls of IP-Adapter."""

import re
from dataclasses import replace

import pytest
import torch

from i2am.layouts import AttentionCall, Encoder, Frame, Span
from i2am.layouts.registry import known_layout

TEXT, IMAGE, WIDE = 6, 5 * 7, 3 * 6
GENERATED = Span("generated", "generated", TEXT, (5, 7))
REFERENCE = Span("reference", "reference", TEXT + IMAGE, (3, 6))
FIRST = Span("reference 1", "reference", TEXT + IMAGE, (3, 6))  # of several
PROMPT = Span("text", "text", 0, (TEXT,))
LAYERS = {
    "transformer_blocks.0.attn",
    "transformer_blocks.1.attn",
    "single_transformer_blocks.0.attn",
}


def watched(watch, model):
    with watch(model.denoiser) as watching:
        model()
    return watching.of(known_layout(model.pipe, model.denoiser))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("dev", (PROMPT, GENERATED)),
        ("img2img", (PROMPT, GENERATED)),
        ("inpaint", (PROMPT, GENERATED)),
        ("fill", (PROMPT, GENERATED)),
        ("control", (PROMPT, GENERATED)),
        ("kontext", (PROMPT, GENERATED, REFERENCE)),
        ("kontext inpaint", (PROMPT, GENERATED, REFERENCE)),
    ],
)
def test_spans(watch, tiny, kind, expected):
    found = watched(watch, tiny("flux", kind))
    assert {each.call.layer for each, _ in found} == LAYERS
    assert {sequences for _, sequences in found} == {(expected, expected)}
    assert len(found) == 2 * len(LAYERS)


@pytest.mark.parametrize(
    ("kind", "pictures"),
    [("adapter", (GENERATED,)), ("kontext adapter", (GENERATED, FIRST))],
)
def test_adapters_are_calls_of_their_own(watch, tiny, kind, pictures):
    """Their queries are all pictures, without the text; their images are references behind them."""
    found = watched(watch, tiny("flux", kind))
    joint = (PROMPT, *pictures)
    queries = tuple(Span(s.name, s.role, s.start - TEXT, s.grid) for s in pictures)
    first, second = (f"reference {len(pictures) + index}" for index in range(2))
    expected = {
        0: (joint, joint),
        1: (queries, (Span(first, "reference", 0, (4,)),)),
        2: (queries, (Span(second, "reference", 0, (3,)),)),
    }
    for each, sequences in found:
        assert sequences == expected[each.call.call_index]
    assert [each.call.call_index for each, _ in found[:4]] == [0, 1, 2, 0]


def test_several_images_of_an_adapter(watch, tiny):
    model = tiny("flux", "adapter")
    images = [torch.ones(1, 2, 20), torch.ones(1, 1, 20)]
    with watch(model.denoiser) as watching:
        model(ip_adapter_image_embeds=images, negative_ip_adapter_image_embeds=images)
    found = watching.of(known_layout(model.pipe, model.denoiser))
    keys = [sequences.key for each, sequences in found if each.call.call_index]
    assert keys[:2] == [
        (
            Span("reference 1", "reference", 0, (4,)),
            Span("reference 2", "reference", 4, (4,)),
        ),
        (Span("reference 3", "reference", 0, (3,)),),
    ]


def test_adapter_that_is_not_given_an_image(tiny):
    """Whatever attends a second time is not its call."""
    model = tiny("flux", "adapter")
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(5), torch.arange(7))
    frame = Frame(None, {"img_ids": ids, "encoder_hidden_states": torch.ones(1, TEXT, 1)})
    layout = known_layout(model.pipe, model.denoiser)
    call = AttentionCall("transformer_blocks.0.attn", 0, TEXT + IMAGE, TEXT + IMAGE)
    assert layout.spans(call, frame).key == (PROMPT, GENERATED)
    with pytest.raises(ValueError, match="expects 1 attention call of a layer, got call 2 of"):
        layout.spans(replace(call, call_index=1), frame)


def test_both_parts_of_guidance_are_alike(watch, tiny):
    model = tiny("chroma")
    found = watched(watch, model)
    lengths = [len_of(sequences) for _, sequences in found]
    assert lengths == [TEXT + IMAGE] * 2 + [TEXT - 2 + IMAGE] * 2 + lengths[:4]
    assert found[0][1].query == (PROMPT, GENERATED)


def len_of(sequences):
    return sequences.key[-1].stop


@pytest.mark.parametrize("kind", ["kontext", "kontext inpaint"])
def test_keys_move_with_their_span_alone(watch, tiny, moved, noise, kind):
    model = tiny("flux", kind)
    with watch(model.denoiser) as watching:
        model()
    arguments = watching.seen[0].frame.arguments
    for span, change in (
        (PROMPT, noise("encoder_hidden_states", 0, TEXT)),
        (GENERATED, noise("hidden_states", 0, IMAGE)),
        (REFERENCE, noise("hidden_states", IMAGE, IMAGE + WIDE)),
    ):
        positions = moved(model.denoiser, arguments, change)
        assert positions == list(range(span.start, span.stop))


def test_keys_of_an_adapter_move_with_its_picture(watch, tiny, moved):
    model = tiny("flux", "adapter")
    with watch(model.denoiser) as watching:
        model()
    arguments = watching.seen[0].frame.arguments

    def change(given):
        attention = given["joint_attention_kwargs"]
        first, second = attention["ip_adapter_image_embeds"]
        return given | {
            "joint_attention_kwargs": attention | {"ip_adapter_image_embeds": [first, second + 1]}
        }

    assert moved(model.denoiser, arguments, change, index=0) == []
    assert moved(model.denoiser, arguments, change, index=1) == []
    assert moved(model.denoiser, arguments, change, index=2) == [0, 1, 2]


def test_keys_of_chroma_move_with_their_span_alone(watch, tiny, moved, noise):
    model = tiny("chroma")
    with watch(model.denoiser) as watching:
        model()
    arguments = watching.seen[0].frame.arguments
    text = noise("encoder_hidden_states", 0, TEXT)
    assert moved(model.denoiser, arguments, text) == list(range(TEXT))
    image = noise("hidden_states", 0, IMAGE)
    assert moved(model.denoiser, arguments, image) == list(range(TEXT, TEXT + IMAGE))


def test_words_are_those_of_t5(tiny):
    model = tiny("flux", "kontext")
    layout = known_layout(model.pipe, model.denoiser)
    assert layout.encoders == (Encoder("text_encoder_2", "tokenizer_2", "text"),)
    model = tiny("chroma")
    layout = known_layout(model.pipe, model.denoiser)
    assert layout.encoders == (Encoder("text_encoder", "tokenizer", "text"),)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("dev", "of its prompt alone"),
        ("img2img", "as latents of the generated tokens"),
        ("inpaint", "as latents of the generated tokens"),
        ("fill", "as input channels"),
        ("control", "as input channels"),
        ("kontext", None),
        ("kontext inpaint", None),
        ("adapter", None),
    ],
)
def test_why_there_is_no_reference(tiny, kind, reason):
    model = tiny("flux", kind)
    layout = known_layout(model.pipe, model.denoiser)
    assert (layout.name, layout.sums) == ("flux", "resized")
    assert "tokens of Redux" in layout.note
    if reason is None:
        assert layout.no_reference == ""
    else:
        name = type(model.pipe).__name__
        assert re.match(rf"{name} has no reference tokens: it.* {reason}", layout.no_reference)


def test_bare_denoiser_is_known_by_what_arrives(watch, tiny):
    model = tiny("flux", "kontext")
    layout = known_layout(model.denoiser, model.denoiser)
    assert layout.no_reference == ""
    with watch(model.denoiser) as watching:
        model()
    assert watching.of(layout)[0][1].key == (PROMPT, GENERATED, REFERENCE)


def test_references_where_none_are_known_are_refused(watch, tiny):
    """A pipeline's own loop may add pictures."""
    model = tiny("flux", "kontext")
    with watch(model.denoiser) as watching:
        model()
    dev = tiny("flux", "dev")
    message = "expects no reference tokens, because it makes .* alone, got reference$"
    with pytest.raises(ValueError, match=message):
        watching.of(known_layout(dev.pipe, dev.denoiser))


def test_rounded_ids(watch, tiny):
    model = tiny("flux", "kontext")
    with watch(model.denoiser) as watching:
        model()
    call, frame = watching.seen[0].call, watching.seen[0].frame
    ids = frame.arguments["img_ids"].to(torch.bfloat16)
    frame.arguments["img_ids"] = ids
    layout = known_layout(model.pipe, model.denoiser)
    assert layout.spans(call, frame).key == (PROMPT, GENERATED, REFERENCE)
