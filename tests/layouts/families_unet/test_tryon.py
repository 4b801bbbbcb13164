"""Try-on by self-attention: a canvas of two pictures, and a second UNet for the garment."""

import pytest
import torch
from diffusers import StableDiffusionXLInpaintPipeline
from torch import nn

from i2am.layouts import (
    AttentionCall,
    Frame,
    Span,
    TokenLayout,
    appended_features,
    spatial_concatenation,
)
from i2am.layouts.registry import known_layout

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"


def level(layer):
    if layer.startswith("mid"):
        return 2
    number = int(layer.split(".")[1])
    return number if layer.startswith("down") else 2 - number


def local(unet):
    """Without what lets every position see every other, so that a change stays where it is."""
    for module in [*unet.modules()]:
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
            if name == "attn1":
                child.register_forward_hook(lambda _, args, output: torch.zeros_like(output))


def halves(grid, axis):
    """Boxes of the first and the second half."""
    half = grid[axis] // 2
    boxes = []
    for part in ((0, half), (half, 2 * half)):
        box = [(0, side) for side in grid]
        box[axis] = part
        boxes.append(tuple(box))
    return boxes


class TestCanvas:
    @pytest.mark.parametrize(
        ("name", "axis", "size"),
        [("CatVTONPipeline", -2, (32, 12)), ("CatVTONPix2PixPipeline", -1, (16, 24))],
    )
    def test_catvton(self, tiny, name, axis, size):
        pipe = getattr(tiny, name)()
        layout = known_layout(pipe, pipe.unet)
        assert layout.name == f"spatial_concatenation {'height' if axis == -2 else 'width'}"
        assert layout.guidance_order is None  # without the garment first, as by default
        watched = tiny.watch(pipe.unet, layout, pipe)
        assert len(watched.seen) == 2 * 7
        for seen in watched.seen:
            grid = tuple(side >> level(seen.call.layer) for side in size)
            person, garment = halves(grid, axis)
            spans = seen.spans(layout)
            assert spans.query == spans.key
            assert spans.generated == Span("generated", "generated", 0, grid, person)
            assert spans.keys_of("reference") == (Span("reference", "reference", 0, grid, garment),)

    def test_subclass_may_join_otherwise(self, tiny):
        class Other(tiny.CatVTONPipeline):
            axis = -1

        pipe = Other()
        assert known_layout(pipe, pipe.unet) is None

    @pytest.mark.parametrize("axis", [-2, -1])
    @pytest.mark.parametrize("generated", ["first", "second"])
    def test_a_picture_moves_its_keys_alone(self, tiny, axis, generated):
        unet = tiny.make_unet()
        local(unet)
        layout = spatial_concatenation(axis, generated)
        # a border in the middle of a level would be at a token of both
        size = {-2: (64, 9), -1: (9, 64)}[axis]
        sample = tiny.noise(1, 4, *size)
        for number, part in enumerate(("first", "second")):
            changed = sample.clone()
            place = [4, 4]
            place[axis] = 16 + 32 * number
            changed[..., place[0], place[1]] += 9
            before, after = (
                tiny.watch(
                    unet,
                    layout,
                    tiny.again(
                        unet,
                        {
                            "sample": given,
                            "timestep": 5,
                            "encoder_hidden_states": tiny.noise(1, 3, tiny.CONTEXT),
                        },
                    ),
                )
                for given in (sample, changed)
            )
            name = "generated" if part == generated else "reference"
            down = [
                pair
                for pair in zip(before.seen, after.seen, strict=True)
                if pair[0].call.layer.startswith("down")
            ]
            assert len(down) == 2
            for one, two in down:
                own = tiny.tokens(one.spans(layout).key, name)
                assert tiny.moved(one, two)
                assert tiny.moved(one, two) <= own

    @pytest.mark.parametrize(
        ("axis", "canvas", "tokens", "message"),
        [
            (-2, (26, 9), 65, "height of both pictures together must be a multiple of 4 latents"),
            (-1, (9, 26), 65, "width of both pictures together must be a multiple of 4 latents"),
            # 6 -> 3 -> 2 rows: even again, and the border is in the middle of one
            (-2, (6, 8), 4, "a multiple of 8 latents, so that no token of .* shows both, got 6"),
            (-2, (7, 4), 28, "a multiple of 2 latents, so that no token of .* shows both, got 7"),
        ],
        ids=["height", "width", "even again", "odd"],
    )
    def test_border_inside_a_token(self, axis, canvas, tokens, message):
        layer = "processor"  # a path that tells no level
        call = AttentionCall(layer, 0, tokens, tokens)
        with pytest.raises(ValueError, match=message):
            spatial_concatenation(axis).spans(call, Frame(canvas))

    def test_the_other_side_may_be_odd(self):
        spans = spatial_concatenation().spans(AttentionCall(LAYER, 0, 40, 40), Frame((16, 9)))
        assert spans.generated.size == (4, 5)

    def test_no_level(self):
        assert spatial_concatenation().spans(AttentionCall(LAYER, 0, 5, 5), Frame((16, 9))) is None

    def test_other_keys(self):
        with pytest.raises(ValueError, match=r"self-attention, .* got 40 queries and 77 keys in"):
            spatial_concatenation().spans(AttentionCall(LAYER, 0, 40, 77), Frame((16, 9)))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"axis": 1}, r"axis must be -2 \(height\) or -1 \(width\), got 1"),
            ({"generated": "left"}, "generated must be 'first' or 'second', got 'left'"),
        ],
    )
    def test_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            spatial_concatenation(**arguments)

    def test_layers(self):
        layout = spatial_concatenation()
        assert layout.matches(LAYER)
        assert layout.matches("mid_block.attentions.0.transformer_blocks.1.attn1")
        for other in (LAYER.replace("attn1", "attn2"), f"controlnet.{LAYER}"):
            assert not layout.matches(other)
        assert spatial_concatenation(layers="own$").matches("own")


class TestSecondUNet:
    @pytest.mark.parametrize(
        ("kind", "denoiser", "order"),
        [
            ("idm_vton", "unet", None),
            ("ootdiffusion", "unet_vton", ("conditional", "unconditional")),
        ],
    )
    def test_spans(self, tiny, kind, denoiser, order):
        pipe = getattr(tiny, kind)()
        unet = getattr(pipe, denoiser)
        layout = known_layout(pipe, unet)
        assert (layout.name, layout.guidance_order) == ("reference_unet", order)
        assert "second UNet" in layout.note
        watched = tiny.watch(unet, layout, pipe)
        assert len(watched.seen) == 2 * 7
        for seen in watched.seen:
            grid = (16 >> level(seen.call.layer), 12 >> level(seen.call.layer))
            expected = (
                Span("generated", "generated", 0, grid),
                Span("reference", "reference", grid[0] * grid[1], grid),
            )
            assert seen.spans(layout) == (expected, expected)
            assert expected[1].stop == seen.call.seqlen_k

    @pytest.mark.parametrize("kind", ["idm_vton", "ootdiffusion"])
    @pytest.mark.parametrize(
        ("changed", "name"), [("person", "generated"), ("garment", "reference")]
    )
    def test_a_picture_moves_its_keys_alone(self, tiny, kind, changed, name):
        pipe = getattr(tiny, kind)()
        unet = getattr(pipe, "unet" if kind == "idm_vton" else "unet_vton")
        layout = known_layout(pipe, unet)
        channels = {"person": 9 if kind == "idm_vton" else 4, "garment": 4}[changed]
        before, after = (
            tiny.watch(unet, layout, lambda given=given: pipe(**{changed: given}, steps=1))
            for given in (tiny.noise(1, channels, 16, 12), tiny.noise(1, channels, 16, 12, seed=7))
        )
        # later layers mix both
        one, two = before.seen[0], after.seen[0]
        assert tiny.moved(one, two) == tiny.tokens(one.spans(layout).key, name)

    def test_odd_sizes(self, tiny):
        pipe = tiny.ootdiffusion()
        layout = known_layout(pipe, pipe.unet_vton)
        person, garment = tiny.noise(1, 4, 13, 9), tiny.noise(1, 4, 13, 9, seed=1)
        watched = tiny.watch(pipe.unet_vton, layout, lambda: pipe(person, garment, steps=1))
        grids = {level(seen.call.layer): seen.spans(layout).generated.grid for seen in watched.seen}
        assert grids == {0: (13, 9), 1: (7, 5), 2: (4, 3)}

    def test_generated_queries_alone(self):
        layout = appended_features()
        spans = layout.spans(AttentionCall(LAYER, 0, 35, 70), Frame((13, 9)))
        assert spans.query == (Span("generated", "generated", 0, (7, 5)),)
        assert spans.key[1] == Span("reference", "reference", 35, (7, 5))
        assert layout.spans(AttentionCall(LAYER, 0, 34, 68), Frame((13, 9))) is None

    @pytest.mark.parametrize("keys", [71, 72, 35])
    def test_other_keys(self, keys):
        message = f"as many reference as generated tokens .* got 35 queries and {keys} keys in"
        with pytest.raises(ValueError, match=message):
            appended_features().spans(AttentionCall(LAYER, 0, 35, keys), Frame((13, 9)))

    def test_the_pipeline_of_the_same_name_has_words(self, tiny):
        pipe = tiny.sdxl(StableDiffusionXLInpaintPipeline)
        assert type(pipe).__name__ == type(tiny.idm_vton()).__name__
        layout = known_layout(pipe, pipe.unet)
        assert layout.name == "text"
        assert "its image enters as latents and input channels" in layout.no_reference

    def test_denoiser_of_a_class_of_its_own(self, tiny):
        class UNetVton2DConditionModel(nn.Module):
            pass

        unet = UNetVton2DConditionModel()
        assert known_layout(unet, unet).name == "reference_unet"


def test_options_go_to_the_layout():
    for layout in (spatial_concatenation(note="mine"), appended_features(note="mine")):
        assert isinstance(layout, TokenLayout)
        assert layout.note == "mine"
