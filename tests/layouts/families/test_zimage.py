"""Z-Image: samples of different length in one batch, each padded to multiples of 32 tokens."""

from dataclasses import replace

import pytest
import torch

from i2am.layouts import Encoder, Span
from i2am.layouts.registry import known_layout

IMAGE, PADDED = 5 * 7, 64
TEXTS = (7, 40)  # padded to 32 and 64
SEQLEN = PADDED + 64
GENERATED = Span("generated", "generated", 0, (5, 7))
PADDING = Span("generated padding", "other", IMAGE, (PADDED - IMAGE,))


def expected(row):
    """The shorter sample is padded to the longer one."""
    text = TEXTS[row]
    own = PADDED + text + -text % 32
    batch = (Span("padding", "other", own, (SEQLEN - own,)),) if own < SEQLEN else ()
    return (
        GENERATED,
        PADDING,
        Span("text", "text", PADDED, (text,)),
        Span("text padding", "other", PADDED + text, (-text % 32,)),
        *batch,
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
    reason = "it makes an image of its prompt alone"
    assert layout.no_reference == f"ZImagePipeline has no reference tokens: {reason}"


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


def test_shorter_sequences_are_refused(watch, tiny):
    model = tiny("zimage")
    layout = known_layout(model.pipe, model.denoiser)
    with watch(model.denoiser) as watching:
        model()
    each = watching.of(layout)[0][0]
    with pytest.raises(ValueError, match="= 96 queries, got 64 in layers"):
        layout.spans(replace(each.call, seqlen_q=64, seqlen_k=64), each.frame)


class TestSeveralPictures:
    """A reference of 4x3 tokens before the image, and one that is not there."""

    TEXT = (7, 3, 2)
    NAMES = (
        "template 1",
        "template 1 padding",
        "text",
        "text padding",
        "template 2",
        "template 2 padding",
        "reference",
        "reference padding",
        "generated",
        "generated padding",
        "reference (SigLIP)",
        "reference (SigLIP) padding",
        "generated (SigLIP) padding",
    )

    def arguments(self):
        def normal(*shape):
            return torch.randn(*shape, generator=torch.Generator().manual_seed(0))

        return {
            "x": [[normal(16, 1, 8, 6), normal(16, 1, 10, 14)]],
            "t": torch.tensor([0.5]),
            "cap_feats": [[normal(length, 24) for length in self.TEXT]],
            "siglip_feats": [[normal(2, 3, 20), None]],
            "image_noise_mask": [[0, 1]],
        }

    @pytest.fixture
    def net(self, tiny):
        return tiny("zimage", siglip_feat_dim=20, in_channels=16).denoiser

    def spans(self, watch, net, arguments):
        pipe = type("ZImageOmniPipeline", (), {})()
        with watch(net) as watching, torch.no_grad():
            net(**arguments)
        found = watching.of(known_layout(pipe, net))
        assert [sequences for _, sequences in found[1:]] == [found[0][1]]
        return {span.name: span for span in found[0][1].key}

    def test_spans(self, watch, net):
        found = self.spans(watch, net, self.arguments())
        assert tuple(found) == self.NAMES
        assert found["text"] == Span("text", "text", 32, (3,))
        assert found["template 2"] == Span("template 2", "other", 64, (2,))
        assert found["reference"] == Span("reference", "reference", 96, (4, 3))
        assert found["generated"] == Span("generated", "generated", 128, (5, 7))
        assert found["reference (SigLIP)"].grid == (6,)
        assert found["generated (SigLIP) padding"].count == 32

    def test_without_features_and_pictures(self, watch, net):
        arguments = self.arguments()
        arguments["x"][0][0] = arguments["siglip_feats"][0] = None
        found = self.spans(watch, net, arguments)
        assert tuple(found)[6:] == ("reference padding", "generated", "generated padding")
        assert found["reference padding"].count == 32

    def test_keys_move_with_their_part_alone(self, watch, net, moved):
        """Its refiners mix the pictures, so that they are told apart in the first of them."""
        arguments = self.arguments()
        found = self.spans(watch, net, arguments)

        def other(name, index):
            def change(given):
                values = list(given[name][0])
                values[index] = values[index] + 1 + values[index].flip(-1)
                return given | {name: [values]}

            return change

        whole = {
            "cap_feats": range(96),
            "x": range(96, 192),
            "siglip_feats": range(192, 256),
        }
        for name, expected in whole.items():
            layer = "layers.0.attention"
            assert moved(net, arguments, other(name, 0), layer) == list(expected)
        layer = "noise_refiner.0.attention"
        for index, name in enumerate(("reference", "generated")):
            span = found[name]
            positions = moved(net, arguments, other("x", index), layer)
            assert positions == list(range(span.start - 96, span.stop - 96))

    def test_features_have_no_place(self, net):
        """The transformer lays them out anew: a token of theirs holds many places."""
        features = torch.arange(6).view(2, 3, 1).expand(-1, -1, 20).float()
        arguments = self.arguments() | {"siglip_feats": [[features, None]]}
        seen = []
        hook = net.siglip_embedder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with hook, torch.no_grad():
            net(**arguments)
        assert len(seen[0][0].unique()) == 6

    def test_what_the_layout_declares(self, net):
        layout = known_layout(type("ZImageOmniPipeline", (), {})(), net)
        assert layout.guidance_order == ("conditional", "unconditional")
        assert layout.encoders == ()
        assert layout.no_reference == ""
        assert "mixed with each other before these layers" in layout.note
        assert known_layout(net, net).no_reference == ""

    def test_one_picture_is_noisy(self, watch, net):
        with watch(net) as watching, torch.no_grad():
            net(**self.arguments())
        each = watching.seen[-1]
        arguments = each.frame.arguments | {"image_noise_mask": [[1, 1]]}
        message = r"image_noise_mask to mark one noisy picture of each sample, got \[1, 1\]"
        with pytest.raises(ValueError, match=message):
            known_layout(net, net).spans(each.call, replace(each.frame, arguments=arguments))
