"""Z-Image: samples of different length in one batch, each padded to multiples of 32 tokens."""

from dataclasses import replace

import pytest

from i2am.layouts import Encoder, Span
from i2am.layouts.registry import known_layout

IMAGE, PADDED = 5 * 7, 64
TEXTS = (7, 40)  # padded to 32 and 64
SEQLEN = PADDED + 64
GENERATED = Span("generated", "generated", 0, (5, 7))
PADDING = Span("image padding", "other", IMAGE, (PADDED - IMAGE,))


def expected(row):
    text = TEXTS[row]
    return (
        GENERATED,
        PADDING,
        Span("text", "text", PADDED, (text,)),
        Span("text padding", "other", PADDED + text, (SEQLEN - PADDED - text,)),
    )


def test_spans_of_every_row(watch, tiny):
    model = tiny("zimage")
    layout = known_layout(model.pipe, model.denoiser)
    with watch(model.denoiser) as watching:
        model()
    found = watching.of(layout)
    # the refiners attend to the image or the text alone
    assert [each.call.layer for each, _ in found] == [
        "layers.0.attention",
        "layers.1.attention",
    ] * 2
    for each, _ in found:
        assert each.call.seqlen_k == SEQLEN
        for row in range(2):
            sequences = layout.spans(each.call, replace(each.frame, row=row))
            assert sequences == (expected(row), expected(row))


def test_conditional_samples_come_first(tiny):
    model = tiny("zimage")
    layout = known_layout(model.pipe, model.denoiser)
    assert layout.guidance_order == ("conditional", "unconditional")
    assert layout.ragged
    assert (layout.name, layout.sums) == ("zimage", "resized")
    assert layout.encoders == (Encoder("text_encoder", "tokenizer", "text"),)
    assert layout.no_reference == "it makes an image of its prompt alone"


def test_order_in_a_loop_of_ones_own_is_not_known(tiny):
    model = tiny("zimage")
    layout = known_layout(model.denoiser, model.denoiser)
    assert layout.guidance_order is None
    assert layout.no_reference


@pytest.mark.parametrize("row", [0, 1])
def test_keys_move_with_their_span_alone(watch, tiny, moved, row):
    """Refiners mix the tokens of a part with its own padding before these layers."""
    model = tiny("zimage")
    with watch(model.denoiser) as watching:
        model()
    arguments = watching.seen[0].frame.arguments

    def other(name):
        def change(given):
            values = list(given[name])
            values[row] = values[row] + 1 + values[row].flip(-1)
            return given | {name: values}

        return change

    image = moved(model.denoiser, arguments, other("x"), "layers.0.attention", row=row)
    assert image == list(range(PADDED))
    text = moved(model.denoiser, arguments, other("cap_feats"), "layers.0.attention", row=row)
    whole = TEXTS[row] + -TEXTS[row] % 32
    assert text == list(range(PADDED, PADDED + whole))
    unmoved = moved(model.denoiser, arguments, other("x"), "layers.0.attention", row=1 - row)
    assert unmoved == []


def test_a_single_sample_is_not_padded_to_another(watch, tiny):
    model = tiny("zimage")
    layout = known_layout(model.pipe, model.denoiser)
    with watch(model.denoiser) as watching:
        model(guidance_scale=0.0)
    found = watching.of(layout)
    assert found[0][1].key[-1] == Span("text padding", "other", PADDED + 7, (25,))


def test_several_pictures_are_refused(watch, tiny):
    model = tiny("zimage")
    layout = known_layout(model.pipe, model.denoiser)
    with watch(model.denoiser) as watching:
        model()
    each = watching.of(layout)[0][0]
    arguments = each.frame.arguments
    nested = replace(each.frame, arguments=arguments | {"x": [[item] for item in arguments["x"]]})
    with pytest.raises(ValueError, match="expects one picture for each sample of Z-Image"):
        layout.spans(each.call, nested)


def test_shorter_sequences_are_refused(watch, tiny):
    model = tiny("zimage")
    layout = known_layout(model.pipe, model.denoiser)
    with watch(model.denoiser) as watching:
        model()
    each = watching.of(layout)[0][0]
    with pytest.raises(ValueError, match="= 96 queries, got 64 in layers"):
        layout.spans(replace(each.call, seqlen_q=64, seqlen_k=64), each.frame)
