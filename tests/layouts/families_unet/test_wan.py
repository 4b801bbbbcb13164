"""Wan: words, tokens of an image, and frames that are given."""

import contextlib

import pytest
import torch

from i2am.layouts import AttentionCall, Encoder, Frame, Span, first_frame, reference_frames
from i2am.layouts.registry import known_layout
from i2am.layouts.wan import cross_attention

GRID = (3, 2, 3)  # 9 frames of 32x48: 3 x 4 x 6 latents
REASONS = {
    "t2v": "WanPipeline has no reference image",
    "t2v_22": "WanPipeline has no reference image",
    "i2v_22": "WanImageToVideoPipeline has no reference tokens: its image enters as input channels",
    "ti2v_22": "layout=i2am.layouts.first_frame() records how later frames attend to the first",
}
TEXT = (Span("text", "text", 0, (512,)),)


@pytest.mark.parametrize("kind", REASONS)
def test_words(tiny, kind):
    pipe = tiny.wan(kind)
    layout = known_layout(pipe, pipe.transformer)
    assert (layout.name, layout.sums) == ("wan", "resized")
    assert "latent frame f its frames 4f - 3 to 4f" in layout.note
    assert layout.encoders == ()  # it has none here
    assert REASONS[kind] in layout.no_reference
    nets = [pipe.transformer, pipe.transformer_2] if kind.endswith("v_22") else [pipe.transformer]
    nets = [net for net in nets if net is not None]
    with contextlib.ExitStack() as stack, torch.no_grad():
        watching = [stack.enter_context(tiny.Watch(net, layout)) for net in nets]
        pipe(**tiny.wan_arguments(kind))
    assert all(each.seen for each in watching)
    seen = [one for each in watching for one in each.seen]
    for one in seen:
        assert one.call.call_index == 0
        spans = one.spans(layout)
        assert spans.generated == Span("generated", "generated", 0, GRID)
        assert (spans.key, spans.generated.frames) == (TEXT, 3)


def test_words_of_a_text_encoder(tiny):
    pipe = tiny.wan("t2v")
    pipe.text_encoder = torch.nn.Linear(1, 1)
    assert known_layout(pipe, pipe.transformer).encoders == (Encoder("text_encoder", "tokenizer"),)


class TestImageTokens:
    def test_image_and_words(self, tiny):
        pipe = tiny.wan("i2v")
        layout = known_layout(pipe, pipe.transformer)
        assert layout.no_reference == ""
        with torch.no_grad():
            watched = tiny.watch(
                pipe.transformer, layout, lambda: pipe(**tiny.wan_arguments("i2v"))
            )
        assert {seen.call.call_index for seen in watched.seen} == {0, 1}
        image = (Span("prefix", "other", 0, (1,)), Span("reference", "reference", 1, (4, 4)))
        for seen in watched.seen:
            spans = seen.spans(layout)
            assert spans.generated.grid == GRID
            assert spans.key == (TEXT if seen.call.call_index else image)

    @pytest.mark.parametrize(
        ("changed", "token", "name", "index"),
        [
            ("encoder_hidden_states_image", 0, "prefix", 0),
            ("encoder_hidden_states_image", 5, "reference", 0),
            ("encoder_hidden_states", 5, "text", 1),
        ],
    )
    def test_a_token_moves_its_key_alone(self, tiny, changed, token, name, index):
        pipe = tiny.wan("i2v")
        layout = known_layout(pipe, pipe.transformer)
        given = {
            "hidden_states": tiny.noise(1, 12, 2, 4, 6),
            "timestep": torch.tensor([5]),
            "encoder_hidden_states": tiny.noise(1, 512, 12),
            "encoder_hidden_states_image": tiny.noise(1, 17, 20),
        }
        other = given[changed].clone()
        other[:, token] += tiny.noise(*other[:, token].shape, seed=5)
        before, after = (
            tiny.watch(pipe.transformer, layout, tiny.again(pipe.transformer, arguments))
            for arguments in (given, {**given, changed: other})
        )
        for one, two in zip(before.seen, after.seen, strict=True):
            if one.call.call_index == index:
                assert tiny.moved(one, two) == {token}
                assert token in tiny.tokens(one.spans(layout).key, name)
            else:
                assert not tiny.moved(one, two)

    def spans(self, layout, keys, **config):
        given = {"hidden_states": torch.empty(1, 12, 3, 5, 6, device="meta")}
        frame = Frame(None, given, {"patch_size": (1, 2, 2), "added_kv_proj_dim": 32} | config)
        return layout.spans(AttentionCall("blocks.0.attn2", 0, 18, keys), frame)

    def test_published_model(self):
        key = self.spans(cross_attention((16, 16)), 257).key
        assert key[1] == Span("reference", "reference", 1, (16, 16))

    def test_first_and_last_frame(self):
        key = self.spans(cross_attention((16, 16)), 514, pos_embed_seq_len=514).key
        assert [span.name for span in key] == ["prefix", "reference 1", "prefix", "reference 2"]
        assert [span.start for span in key] == [0, 1, 257, 258]

    def test_patches_that_are_not_known(self):
        layout = cross_attention()
        assert self.spans(layout, 257).key == (Span("reference", "reference", 0, (257,)),)

    def test_encoder_by_its_width(self, tiny):
        """Embeddings may come from elsewhere: published models have one and the same encoder."""
        for width, place in ((1280, (16, 16)), (20, None)):
            net = tiny.wan_transformer(image_dim=width, added_kv_proj_dim=32)
            key = self.spans(known_layout(net, net), 257).key
            assert key[-1].place == place

    @pytest.mark.parametrize(
        ("keys", "config"), [(256, {}), (514, {}), (257, {"pos_embed_seq_len": 514})]
    )
    def test_other_counts(self, keys, config):
        with pytest.raises(ValueError, match=r"expects 1 \+ 16x16 tokens for each of [12] images"):
            self.spans(cross_attention((16, 16)), keys, **config)

    def test_odd_sizes_are_rounded_down(self, tiny):
        net = tiny.wan_transformer()
        layout = known_layout(net, net)
        assert "no cross-attention to an image" in layout.no_reference
        arguments = {
            "hidden_states": tiny.noise(1, 4, 3, 13, 21),
            "timestep": torch.tensor([5]),
            "encoder_hidden_states": tiny.noise(1, 512, 12),
        }
        watched = tiny.watch(net, layout, tiny.again(net, arguments))
        assert {seen.spans(layout).generated.grid for seen in watched.seen} == {(3, 6, 10)}
        with pytest.raises(ValueError, match="expects 3x6x10 tokens of the video, got 181 queries"):
            layout.spans(AttentionCall("blocks.0.attn2", 0, 181, 512), watched.frames[0])


class TestFrames:
    @pytest.mark.parametrize("kind", ["i2v", "i2v_22", "ti2v_22"])
    def test_first_frame(self, tiny, kind):
        pipe, layout = tiny.wan(kind), first_frame()
        with torch.no_grad():
            watched = tiny.watch(pipe.transformer, layout, lambda: pipe(**tiny.wan_arguments(kind)))
        assert watched.seen
        for seen in watched.seen:
            spans = seen.spans(layout)
            assert spans.query == spans.key
            assert spans.generated.size == (2, 2, 3)
            (reference,) = spans.keys_of("reference")
            assert (reference.name, reference.size) == ("first frame", (1, 2, 3))

    @pytest.mark.parametrize("number", [1, 2])
    def test_a_frame_moves_its_keys_alone(self, tiny, number):
        net, layout = tiny.wan_transformer(), reference_frames(number)
        names = {1: ["reference"], 2: ["reference 2", "reference 1"]}[number]
        given = {
            "hidden_states": tiny.noise(1, 4, 4, 6, 6),
            "timestep": torch.tensor([5]),
            "encoder_hidden_states": tiny.noise(1, 512, 12),
        }
        before = tiny.watch(net, layout, tiny.again(net, given)).seen[0]
        every = set()
        for index, name in enumerate([*names, "generated"]):
            other = given["hidden_states"].clone()
            other[:, :, slice(index, None if name == "generated" else index + 1)] += 1
            after = tiny.watch(net, layout, tiny.again(net, {**given, "hidden_states": other}))
            own = tiny.tokens(before.spans(layout).key, name)
            # attention mixes frames from the second layer on
            assert tiny.moved(before, after.seen[0]) == own
            every |= own
        assert every == {*range(4 * 3 * 3)}

    def test_pictures_of_vace_are_in_front_and_in_reverse(self, tiny):
        pipe, layout = tiny.wan("vace"), reference_frames(2)
        given = tiny.wan_arguments("vace")
        frames = []
        for image in (given["reference_images"][0], tiny.picture(32, 48, seed=9)):
            given["reference_images"][0] = image
            with torch.no_grad():
                watched = tiny.watch(
                    pipe.transformer,
                    layout,
                    lambda: pipe(**given, generator=torch.Generator().manual_seed(0)),
                )
            frames.append(watched.frames[0].arguments["control_hidden_states"])
        moved = (frames[0] != frames[1]).any(1).flatten(2).any(2)[0].nonzero().flatten().tolist()
        for seen in watched.seen:
            first = next(span for span in seen.spans(layout).key if span.name == "reference 1")
            assert [*range(*first.box[0])] == moved
            assert seen.spans(layout).generated.size == GRID
        assert len(watched.seen) == 2 * len(watched.frames)  # not the layers of the control blocks

    def test_vace_is_not_guessed(self, tiny):
        pipe = tiny.wan("vace")
        for subject in (pipe, pipe.transformer):
            message = (
                f"layout must be given for {type(subject).__name__}, whose reference pictures are "
                r"frames .* layout=i2am.layouts.reference_frames\(number\)"
            )
            with pytest.raises(ValueError, match=message):
                known_layout(subject, pipe.transformer)

    def test_words_of_vace_without_pictures(self, tiny):
        pipe, layout = tiny.wan("vace"), cross_attention()
        given = tiny.wan_arguments("vace")
        given.pop("reference_images")
        with torch.no_grad():
            watched = tiny.watch(pipe.transformer, layout, lambda: pipe(**given))
        for seen in watched.seen:
            assert seen.spans(layout).generated.grid == GRID
            assert seen.spans(layout).key == TEXT

    def test_refused(self):
        with pytest.raises(ValueError, match="number must be at least 1, got 0"):
            reference_frames(0)
        arguments = {"hidden_states": torch.empty(1, 4, 1, 4, 4, device="meta")}
        frame = Frame(None, arguments, {"patch_size": (1, 2, 2)})
        with pytest.raises(ValueError, match="latent frames behind the first 1, got 1 in all"):
            first_frame().spans(AttentionCall("blocks.0.attn1", 0, 4, 4), frame)
        with pytest.raises(ValueError, match=r"self-attention, .* got 4 queries and 512 keys"):
            first_frame().spans(AttentionCall("blocks.0.attn1", 0, 4, 512), frame)
