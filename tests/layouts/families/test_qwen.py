"""Qwen-Image and its editing: pictures by their shapes, texts of different lengths."""

import pytest
import torch

from i2am.layouts import AttentionCall, Encoder, Frame, Span
from i2am.layouts.registry import known_layout

TEXT, IMAGE = 7, 5 * 7
PROMPT = Span("text", "text", 0, (TEXT,))
GENERATED = Span("generated", "generated", TEXT, (5, 7))
LAYERS = ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]


def watched(watch, model):
    with watch(model.denoiser) as watching:
        model()
    return watching.of(known_layout(model.pipe, model.denoiser))


@pytest.mark.usefixtures("small_references")
@pytest.mark.parametrize(
    ("kind", "references"),
    [
        ("text", ()),
        ("edit", (Span("reference", "reference", TEXT + IMAGE, (16, 8)),)),
        (
            "edit plus",
            (
                Span("reference 1", "reference", TEXT + IMAGE, (8, 16)),
                Span("reference 2", "reference", TEXT + IMAGE + 128, (16, 8)),
            ),
        ),
    ],
)
def test_spans(watch, tiny, kind, references):
    model = tiny("qwen", kind, guidance=False)
    found = watched(watch, model)
    expected = (PROMPT, GENERATED, *references)
    assert [each.call.layer for each, _ in found] == LAYERS * 2
    assert {sequences for _, sequences in found} == {(expected, expected)}
    layout = known_layout(model.pipe, model.denoiser)
    assert (layout.no_reference == "") == bool(references)
    assert ("in view of the references" in layout.note) == bool(references)
    assert (layout.name, layout.sums) == ("qwen", "resized")


def test_unconditional_text_has_another_length(watch, tiny):
    """Guidance is a second call."""
    found = watched(watch, tiny("qwen", "text"))
    starts = {each.denoiser_call: sequences.generated.start for each, sequences in found}
    assert starts == {0: TEXT, 1: TEXT - 3, 2: TEXT, 3: TEXT - 3}


@pytest.mark.usefixtures("small_references")
def test_padding_of_the_text_is_part_of_it(watch, tiny):
    """It is masked, so that nobody attends to it."""
    found = watched(watch, tiny("qwen", "edit", guidance=False, padded=True))
    assert found[0][1].key[:2] == (PROMPT, GENERATED)


@pytest.mark.usefixtures("small_references")
@pytest.mark.parametrize("padded", [False, True])
def test_keys_move_with_their_span_alone(watch, tiny, moved, noise, padded):
    model = tiny("qwen", "edit plus", guidance=False, padded=padded)
    with watch(model.denoiser) as watching:
        model()
    first = watching.seen[0]
    spans = known_layout(model.pipe, model.denoiser).spans(first.call, first.frame)
    inputs = {
        "text": noise("encoder_hidden_states", 0, TEXT),
        "generated": noise("hidden_states", 0, IMAGE),
        "reference 1": noise("hidden_states", IMAGE, IMAGE + 128),
        "reference 2": noise("hidden_states", IMAGE + 128, IMAGE + 256),
    }
    for span in spans.key:
        positions = moved(model.denoiser, first.frame.arguments, inputs.pop(span.name))
        assert positions == list(range(span.start, span.stop))
    assert not inputs


@pytest.mark.parametrize("dropped", [34, 64])
def test_words_begin_behind_the_template(tiny, dropped):
    model = tiny("qwen", "edit" if dropped == 64 else "text")
    layout = known_layout(model.pipe, model.denoiser)
    assert layout.encoders == (Encoder("text_encoder", "tokenizer", "text", dropped),)


def test_a_shape_for_each_sample(tiny):
    """As pipelines with a ControlNet give them."""
    model = tiny("qwen", "text")
    arguments = {"img_shapes": [(1, 5, 7)] * 2, "encoder_hidden_states": torch.ones(2, TEXT, 1)}
    call = AttentionCall(LAYERS[0], 0, TEXT + IMAGE, TEXT + IMAGE)
    found = known_layout(model.pipe, model.denoiser).spans(call, Frame(None, arguments))
    assert found.key == (PROMPT, GENERATED)


@pytest.mark.usefixtures("small_references")
def test_references_where_none_are_known_are_refused(watch, tiny):
    model, other = tiny("qwen", "edit"), tiny("qwen", "text")
    with watch(model.denoiser) as watching:
        model()
    with pytest.raises(ValueError, match="expects no reference tokens, because it makes"):
        watching.of(known_layout(other.pipe, other.denoiser))
    found = watching.of(known_layout(model.denoiser, model.denoiser))
    assert [span.name for span in found[0][1].key] == ["text", "generated", "reference"]


def test_layered_pictures_are_not_known(tiny):
    """They generate several pictures at once."""
    net = tiny("qwen transformer", use_layer3d_rope=True, use_additional_t_cond=True)
    assert known_layout(net, net) is None
    plain = tiny("qwen transformer")
    assert known_layout(plain, plain).no_reference == ""
