"""FLUX.2: several references of their own sizes, and those that lie in a cache."""

import pytest
import torch

from i2am.layouts import AttentionCall, Encoder, Frame, Span
from i2am.layouts.registry import known_layout

TEXT, IMAGE, WIDE, TALL = 5, 5 * 7, 3 * 6, 7 * 2
PROMPT = Span("text", "text", 0, (TEXT,))
GENERATED = Span("generated", "generated", TEXT, (5, 7))
LAYERS = [
    "transformer_blocks.0.attn",
    "transformer_blocks.1.attn",
    "single_transformer_blocks.0.attn",
]
MODES = [(WIDE, TALL), ()]


def behind(start):
    """Two references of different size, from a token on."""
    return (
        Span("reference 1", "reference", start, (3, 6)),
        Span("reference 2", "reference", start + WIDE, (7, 2)),
    )


def watched(watch, model):
    with watch(model.denoiser) as watching:
        model()
    return watching.of(known_layout(model.pipe, model.denoiser))


@pytest.mark.parametrize("kind", ["dev", "klein"])
def test_two_references(watch, tiny, kind):
    found = watched(watch, tiny("flux2", kind))
    expected = (PROMPT, GENERATED, *behind(TEXT + IMAGE))
    conditional = [sequences for each, sequences in found if each.denoiser_call == 0]
    assert conditional == [(expected, expected)] * len(LAYERS)
    assert all(sequences for _, sequences in found)


@pytest.mark.parametrize("kind", ["dev", "klein", "klein kv"])
def test_without_references(watch, tiny, kind):
    found = watched(watch, tiny("flux2", kind, ()))
    assert found[0][1] == ((PROMPT, GENERATED), (PROMPT, GENERATED))


def test_unconditional_text_has_another_length(watch, tiny):
    """Guidance is a second call."""
    found = watched(watch, tiny("flux2", "klein"))
    starts = {each.denoiser_call: sequences.generated.start for each, sequences in found}
    assert starts == {0: TEXT, 1: TEXT + 2, 2: TEXT, 3: TEXT + 2}


def test_painted_picture_is_the_first_reference(watch, tiny):
    model = tiny("flux2", "klein inpaint")
    found = watched(watch, model)
    start = TEXT + IMAGE
    expected = (
        PROMPT,
        GENERATED,
        Span("reference 1", "reference", start, (5, 7)),
        Span("reference 2", "reference", start + IMAGE, (3, 6)),
        # the pipeline gives all references the size of the first
        Span("reference 3", "reference", start + IMAGE + WIDE, (3, 6)),
    )
    assert found[0][1].key == expected
    note = "the first reference is the picture that is painted into"
    assert note in known_layout(model.pipe, model.denoiser).note
    assert note not in known_layout(model.denoiser, model.denoiser).note


def test_cached_references(watch, tiny):
    """The first call fills the cache, later ones have the references as keys alone."""
    found = watched(watch, tiny("flux2", "klein kv"))
    first, later = ([item for item in found if item[0].denoiser_call == at] for at in (0, 1))
    query = (PROMPT, GENERATED)
    last = Span("generated", "generated", TEXT + WIDE + TALL, (5, 7))
    keys = (PROMPT, *behind(TEXT), last)
    assert [each.call.layer for each, _ in first] == [name for name in LAYERS for _ in range(2)]
    assert [sequences for _, sequences in first] == [(query, keys), None] * len(LAYERS)
    assert [each.call.layer for each, _ in later] == LAYERS
    assert [sequences for _, sequences in later] == [(query, keys)] * len(LAYERS)


def test_cache_that_was_filled_before_is_refused(watch, tiny):
    model = tiny("flux2", "klein kv")
    with watch(model.denoiser) as watching:
        model()
    last = watching.seen[-1]
    layout = known_layout(model.pipe, model.denoiser)
    with pytest.raises(ValueError, match=r"must see the call .* that fills the cache"):
        layout.spans(last.call, Frame(None, last.frame.arguments))


@pytest.mark.parametrize("kind", ["dev", "klein"])
def test_keys_move_with_their_span_alone(watch, tiny, moved, noise, kind):
    model = tiny("flux2", kind)
    with watch(model.denoiser) as watching:
        model()
    arguments = watching.seen[0].frame.arguments
    spans = known_layout(model.pipe, model.denoiser).spans(
        watching.seen[0].call, watching.seen[0].frame
    )
    inputs = {
        "text": noise("encoder_hidden_states", 0, TEXT),
        "generated": noise("hidden_states", 0, IMAGE),
        "reference 1": noise("hidden_states", IMAGE, IMAGE + WIDE),
        "reference 2": noise("hidden_states", IMAGE + WIDE, IMAGE + WIDE + TALL),
    }
    for span in spans.key:
        positions = moved(model.denoiser, arguments, inputs.pop(span.name))
        assert positions == list(range(span.start, span.stop))
    assert not inputs


def test_keys_move_where_the_cache_is_filled(watch, tiny, moved, noise):
    model = tiny("flux2", "klein kv")
    with watch(model.denoiser) as watching:
        model()
    arguments = watching.seen[0].frame.arguments
    sizes = {"reference 1": (0, WIDE), "reference 2": (WIDE, WIDE + TALL)}
    sizes["generated"] = (WIDE + TALL, WIDE + TALL + IMAGE)
    spans = known_layout(model.pipe, model.denoiser).spans(
        watching.seen[0].call, watching.seen[0].frame
    )
    for span in spans.key[1:]:
        positions = moved(model.denoiser, arguments, noise("hidden_states", *sizes[span.name]))
        assert positions == list(range(span.start, span.stop))


def test_keys_move_where_the_cache_is_read(watch, tiny, moved, noise):
    """Another reference in the filled cache moves its keys alone in a later call."""
    model = tiny("flux2", "klein kv")
    with watch(model.denoiser) as watching:
        model()
    first, last = watching.seen[0].frame.arguments, watching.seen[-1].frame.arguments

    @torch.no_grad()
    def cached(hidden_states):
        return model.denoiser(**first | {"hidden_states": hidden_states})[1]

    def change(arguments):
        other = noise("hidden_states", WIDE, WIDE + TALL)(first)["hidden_states"]
        return arguments | {"kv_cache": cached(other)}

    arguments = last | {"kv_cache": cached(first["hidden_states"])}
    positions = moved(model.denoiser, arguments, change)
    reference = behind(TEXT)[1]
    assert positions == list(range(reference.start, reference.stop))
    generated = moved(model.denoiser, arguments, noise("hidden_states", 0, IMAGE))
    assert generated == list(range(TEXT + WIDE + TALL, TEXT + WIDE + TALL + IMAGE))


def test_rounded_ids(watch, tiny):
    model = tiny("flux2", "dev")
    with watch(model.denoiser) as watching:
        model()
    call, frame = watching.seen[0].call, watching.seen[0].frame
    frame.arguments["img_ids"] = frame.arguments["img_ids"].to(torch.bfloat16)
    found = known_layout(model.pipe, model.denoiser).spans(call, frame)
    assert found.key == (PROMPT, GENERATED, *behind(TEXT + IMAGE))


def test_longer_sequences_are_refused(watch, tiny):
    model = tiny("flux2", "dev")
    with watch(model.denoiser) as watching:
        model()
    call, frame = watching.seen[0].call, watching.seen[0].frame
    longer = AttentionCall(call.layer, 0, call.seqlen_q, call.seqlen_k + 1)
    message = (
        r"expects 5 text \+ 35 generated \+ 18 reference 1 \+ 14 reference 2 = 72 keys, got 73 in"
    )
    with pytest.raises(ValueError, match=message):
        known_layout(model.pipe, model.denoiser).spans(longer, frame)


def test_what_the_layout_declares(tiny):
    model = tiny("flux2", "dev")
    layout = known_layout(model.pipe, model.denoiser)
    assert (layout.name, layout.sums, layout.no_reference) == ("flux2", "resized", "")
    assert layout.encoders == (Encoder("text_encoder", "tokenizer", "text"),)
