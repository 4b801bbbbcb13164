"""What the tokens of a call stand for."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from i2am.layouts import AttentionCall, Frame, Sequences, Span, TokenLayout
from i2am.layouts.spans import in_order, joint

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"


def call(queries, keys, call_index=0, layer=LAYER):
    return AttentionCall(layer, call_index, queries, keys)


def span(start, grid, box=None):
    return Span("some", "reference", start, grid, box)


class TestSpan:
    def test_whole_grid(self):
        tokens = span(3, (4, 3))
        assert (tokens.size, tokens.place, tokens.count) == ((4, 3), (4, 3), 12)
        assert (tokens.index, tokens.stop, tokens.frames) == (slice(3, 15), 15, 1)

    def test_without_a_place(self):
        tokens = span(0, (5,))
        assert (tokens.place, tokens.count, tokens.index) == (None, 5, slice(0, 5))

    def test_frames_of_a_video(self):
        tokens = span(7, (3, 4, 5))
        assert (tokens.frames, tokens.place, tokens.count) == (3, (4, 5), 60)
        first = span(7, (3, 4, 5), ((0, 1), (0, 4), (0, 5)))
        assert (first.frames, first.place, first.index) == (1, (4, 5), slice(7, 27))

    def test_full_width_box_is_a_slice(self):
        """Pictures joined in height, as CatVTON's: each half is consecutive."""
        lower = span(2, (8, 3), ((4, 8), (0, 3)))
        assert (lower.place, lower.count, lower.index) == ((4, 3), 12, slice(14, 26))

    def test_narrow_box_is_an_index(self):
        """Pictures joined in width: rows of both alternate."""
        right = span(1, (2, 4), ((0, 2), (2, 4)))
        assert (right.place, right.count) == ((2, 2), 4)
        assert right.index.tolist() == [3, 4, 7, 8]

    @given(data=st.data(), grid=st.lists(st.integers(1, 6), min_size=1, max_size=3))
    def test_any_box_picks_its_part(self, data, grid):
        box = []
        for side in grid:
            first = data.draw(st.integers(0, side - 1))
            box.append((first, data.draw(st.integers(first + 1, side))))
        start = data.draw(st.integers(0, 4))
        sequence = torch.arange(start + math.prod(grid) + 3)
        tokens = span(start, tuple(grid), tuple(box))
        cells = sequence[start : start + math.prod(grid)].view(grid)
        expected = cells[tuple(slice(*each) for each in box)].flatten()
        assert torch.equal(sequence[tokens.index], expected)
        assert tokens.count == len(expected)
        assert tokens.size == tuple(stop - first for first, stop in box)
        consecutive = bool((expected.diff() == 1).all())
        assert isinstance(tokens.index, slice) == consecutive

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((-1, (12,)), "start must be at least 0 and grid 1 to 3 numbers of at least 1, got -1"),
            ((0, (0,)), "grid 1 to 3 numbers of at least 1, got 0 and"),
            ((0, (1, 1, 1, 1)), "grid 1 to 3 numbers"),
            ((0, (4, 3), ((0, 5), (0, 3))), r"box must lie inside grid \(4, 3\)"),
            ((0, (4, 3), ((1, 2), (1, 4))), "box must lie inside"),
            ((0, (4, 3), ((-1, 1), (0, 2))), "box must lie inside"),
            ((0, (4, 3), ((0, 0), (0, 3))), "box must lie inside"),
            ((0, (12,), ((0, 2), (0, 2))), "box must lie inside"),
        ],
        ids=["start", "nothing", "axes", "too high", "too wide", "negative", "empty", "other axes"],
    )
    def test_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            span(*arguments)

    def test_roles_are_known(self):
        with pytest.raises(ValueError, match="role must be one of generated, reference, text, oth"):
            Span("some", "garment", 0, (3,))


class TestSequences:
    def test_in_order(self):
        text, generated, reference = in_order(
            ("text", "text", (5,)),
            ("nothing", "other", (0,)),
            ("generated", "generated", (2, 3)),
            ("reference", "reference", (4, 1)),
        )
        assert (text.start, generated.start, reference.start, reference.stop) == (0, 5, 11, 15)

    def test_one_span_is_generated(self):
        spans = joint(("generated", "generated", (2, 3)), ("text", "text", (4,)))
        assert spans.generated.place == (2, 3)
        assert [each.name for each in spans.keys_of("text")] == ["text"]
        with pytest.raises(ValueError, match="one generated span of the queries, got none"):
            _ = Sequences((), spans.key).generated
        with pytest.raises(ValueError, match="got generated, generated"):
            _ = Sequences(spans.query * 2, ()).generated


class TestFrame:
    @given(height=st.integers(1, 130), width=st.integers(1, 130), rounds_up=st.booleans())
    def test_every_level_is_found(self, height, width, rounds_up):
        frame = Frame((height, width), rounds_up=rounds_up)
        while True:
            assert frame.level_grid(height * width) == (height, width)
            if (height, width) == (1, 1):
                break
            height, width = (max((n + rounds_up) // 2, 1) for n in (height, width))

    @pytest.mark.parametrize("tokens", [0, 3, 47, 49, 10**6])
    def test_other_counts_are_not_guessed(self, tokens):
        assert Frame((8, 6)).level_grid(tokens) is None

    def test_odd_sizes_halve_upwards(self):
        frame = Frame((9, 65))
        assert [frame.level_grid(n) for n in (585, 165, 51, 18)] == [
            (9, 65),
            (5, 33),
            (3, 17),
            (2, 9),
        ]
        assert Frame((13, 22), rounds_up=False).level_grid(66) == (6, 11)
        assert Frame((13, 22)).level_grid(66) is None

    def test_input_without_height_and_width_has_no_levels(self):
        with pytest.raises(ValueError, match=r"not \[batch, channels, height, width\], got one"):
            Frame(None).level_grid(48)

    def test_equality_is_of_size(self):
        assert Frame((8, 6), {"encoder_hidden_states": torch.ones(1)}) == Frame((8, 6))


class TestFamilies:
    FRAME = Frame((8, 6))

    @pytest.mark.parametrize(("grid", "prefix"), [((16, 16), 1), ((4, 3), 0), ((37, 28), 5)])
    def test_cross_attention(self, grid, prefix):
        layout = TokenLayout.cross_attention(grid, prefix=prefix)
        patches = grid[0] * grid[1]
        spans = layout.spans(call(12, prefix + patches), self.FRAME)
        assert spans.generated == Span("generated", "generated", 0, (4, 3))
        assert spans.keys_of("reference") == (Span("reference", "reference", prefix, grid),)
        assert sum(span.count for span in spans.keys_of("other")) == prefix
        assert layout.name == f"cross_attention {grid[0]}x{grid[1]}"

    def test_single_token(self):
        spans = TokenLayout.single_token().spans(call(48, 1), self.FRAME)
        generated, (reference,) = spans.generated, spans.key
        assert generated.size == (8, 6)
        assert (reference.place, reference.count) == (None, 1)

    def test_same_grid(self):
        layout = TokenLayout.same_grid(r"warp_flow_blks\.\d+\.attn2$")
        spans = layout.spans(call(12, 12), self.FRAME)
        assert spans.generated == Span("generated", "generated", 0, (4, 3))
        assert spans.key == (Span("reference", "reference", 0, (4, 3)),)
        assert layout.matches("warp_flow_blks.3.attn2")
        assert not layout.matches(LAYER)

    WARP = "warp_blocks.3.transformer_blocks.0.attn2"
    MID = "mid_block.attentions.0.transformer_blocks.0.attn2"

    @pytest.mark.parametrize("unet_layers", [False, True])
    def test_stableviton_layers(self, unet_layers):
        layout = TokenLayout.stableviton(unet_layers=unet_layers)
        assert layout.matches(self.WARP)
        assert layout.matches("warp_blocks.12.transformer_blocks.0.attn2")
        for name in (LAYER, self.MID, LAYER.replace("down", "up")):
            assert layout.matches(name) == unet_layers
            assert not layout.matches(f"spatial_encoder.{name}")
        for name in (LAYER, self.WARP):
            assert not layout.matches(name.replace("attn2", "attn1"))
        assert "mix garment and person" in layout.note

    def test_stableviton_tokens(self):
        layout = TokenLayout.stableviton(unet_layers=True)
        for queries, grid in ((48, (8, 6)), (12, (4, 3)), (1, (1, 1))):
            made = call(queries, queries, layer=self.WARP)
            spans = layout.spans(made, self.FRAME)
            assert spans.generated == Span("generated", "generated", 0, grid)
            assert spans.key == (Span("reference", "reference", 0, grid),)
            spans = layout.spans(call(queries, 1), self.FRAME)
            (reference,) = spans.key
            assert (spans.generated.place, reference.place, reference.count) == (grid, None, 1)

    def test_ip_adapter_tokens(self):
        layout = TokenLayout.ip_adapter()
        assert layout.spans(call(48, 77), self.FRAME) is None  # the text
        (reference,) = layout.spans(call(48, 16, call_index=1), self.FRAME).key
        assert (reference.place, reference.count) == (None, 16)
        assert TokenLayout.ip_adapter(adapter=1).spans(call(48, 16, 1), self.FRAME) is None

    @pytest.mark.parametrize(("image", "start"), [(0, 1), (1, 18), (2, 35)])
    def test_ip_adapter_patches(self, image, start):
        layout = TokenLayout.ip_adapter((4, 4), prefix=1, image=image)
        (reference,) = layout.spans(call(48, 51, call_index=1), self.FRAME).key
        assert reference == Span("reference", "reference", start, (4, 4))

    @pytest.mark.parametrize(
        ("layout", "made", "message"),
        [
            (TokenLayout.cross_attention((4, 3)), call(48, 12), r"1 \+ 4x3 = 13 .* got 12 keys in"),
            (TokenLayout.single_token(), call(48, 2), "single reference token, got 2 keys"),
            (TokenLayout.same_grid(), call(48, 12), "as many keys as queries, got 12 and 48"),
            (
                TokenLayout.stableviton(),
                call(48, 1, layer="warp_blocks.0.transformer_blocks.0.attn2"),
                "as many keys as queries, got 1 and 48 in warp_blocks.0",
            ),
            (
                TokenLayout.stableviton(),
                call(48, 48),
                "single reference token, got 48 keys in down",
            ),
            (
                TokenLayout.ip_adapter((4, 4), prefix=1, image=1),
                call(48, 17, 1),
                r"images of 1 \+ 16 tokens and image 1 among them, got 17 keys",
            ),
            (TokenLayout.ip_adapter((4, 4)), call(48, 17, 1), r"images of 0 \+ 16 tokens"),
        ],
        ids=[
            "cross_attention",
            "single_token",
            "same_grid",
            "stableviton warp",
            "stableviton unet",
            "missing image",
            "wrong multiple",
        ],
    )
    def test_other_key_counts_are_refused(self, layout, made, message):
        with pytest.raises(ValueError, match=message):
            layout.spans(made, self.FRAME)

    @pytest.mark.parametrize(
        ("layout", "keys", "call_index"),
        [
            (TokenLayout.cross_attention((4, 3)), 13, 0),
            (TokenLayout.single_token(), 1, 0),
            (TokenLayout.same_grid(), 7, 0),
            (TokenLayout.ip_adapter(), 4, 1),
            (TokenLayout.ip_adapter((4, 4)), 16, 1),
        ],
        ids=lambda value: getattr(value, "name", ""),
    )
    def test_queries_without_a_grid_are_left_out(self, layout, keys, call_index):
        assert layout.spans(call(7, keys, call_index), self.FRAME) is None


class TestTokenLayout:
    def test_cross_attention_layers_by_default(self):
        layout = TokenLayout.cross_attention((4, 3))
        assert layout.matches(LAYER)
        assert layout.matches("mid_block.attentions.0.transformer_blocks.11.attn2")
        assert not layout.matches(LAYER.replace("attn2", "attn1"))
        assert not layout.matches("encoder_hid_proj.image_projection_layers.0.layers.0.attn")

    @pytest.mark.parametrize(
        "make",
        [
            lambda **options: TokenLayout.cross_attention((4, 3), **options),
            TokenLayout.single_token,
            TokenLayout.same_grid,
            TokenLayout.stableviton,
            TokenLayout.ip_adapter,
        ],
        ids=["cross_attention", "single_token", "same_grid", "stableviton", "ip_adapter"],
    )
    def test_options_of_every_family(self, make):
        order = ("conditional", "unconditional")
        layout = make(layers="attn1$", guidance_order=order, prefix_votes=True, note="mixed")
        assert layout.layers == "attn1$"
        assert layout.note == "mixed"
        assert layout.guidance_order == order
        assert layout.prefix_votes
        plain = make()
        assert plain.guidance_order is None
        assert not plain.prefix_votes

    def test_order_without_a_conditional_part_is_refused(self):
        with pytest.raises(ValueError, match="guidance_order must contain 'conditional', got"):
            TokenLayout.single_token(guidance_order=("unconditional", "perturbed"))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: TokenLayout.cross_attention((0, 3)), "grid must be at least 1x1, got 0x3"),
            (lambda: TokenLayout.cross_attention((4, 3), prefix=-1), "prefix must be at least 0"),
            (lambda: TokenLayout.ip_adapter((4, 0)), "grid must be at least 1x1, got 4x0"),
            (lambda: TokenLayout.ip_adapter(prefix=-2), "prefix must be at least 0, got -2"),
            (lambda: TokenLayout.ip_adapter(adapter=-1), "adapter must be at least 0, got -1"),
            (lambda: TokenLayout.ip_adapter(image=-1), "image must be at least 0, got -1"),
            (lambda: TokenLayout.ip_adapter(prefix=1), "need a grid, got prefix=1, image=0"),
        ],
        ids=["grid", "prefix", "ip grid", "ip prefix", "adapter", "image", "no grid"],
    )
    def test_impossible_numbers_are_refused(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize(
    ("path", "tags"),
    [
        ("mid_block.attentions.0.transformer_blocks.0.attn2", ("mid",)),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn2", ()),
        ("transformer_blocks.0.attn", ()),
    ],
)
def test_layers_in_the_middle_of_a_unet_are_called_so(path, tags):
    assert TokenLayout.single_token().tags(path) == tags
    assert TokenLayout.stableviton().tags(path) == tags


def test_warp_blocks_are_called_by_their_number():
    layout = TokenLayout.stableviton()
    assert layout.tags("warp_blocks.12.transformer_blocks.0.attn2") == ("warp:12",)
