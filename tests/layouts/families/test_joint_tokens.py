"""Pictures as position ids tell of them, and which pipelines and transformers are known."""

import re

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from i2am.layouts import Frame
from i2am.layouts.joint_tokens import numbered, pictures_of
from i2am.layouts.registry import known_layout


def ids(*pictures, first=(0, 0)):
    """``[seqlen, 3]`` of pictures ``(number, height, width)``."""
    return torch.cat(
        [
            torch.cartesian_prod(
                torch.tensor([number]),
                torch.arange(height) + first[0],
                torch.arange(width) + first[1],
            )
            for number, height, width in pictures
        ]
    ).float()


def parts(tensor, run=None):
    frame = Frame(None, {"img_ids": tensor}, run={} if run is None else run)
    return numbered(*pictures_of(frame))


SIDES = st.integers(1, 9)


@given(
    grids=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=4),
    at=st.integers(0, 3),
    batched=st.booleans(),
    rounded=st.booleans(),
)
def test_every_grid_is_found(grids, at, batched, rounded):
    at %= len(grids)
    numbers = [10 * ((index - at) % len(grids)) for index in range(len(grids))]
    tensor = ids(*((number, *grid) for number, grid in zip(numbers, grids, strict=True)))
    tensor = tensor.to(torch.bfloat16) if rounded else tensor
    found = parts(tensor.expand(2, -1, -1) if batched else tensor)
    assert [grid for *_, grid in found] == grids
    names = ["generated" if index == at else "reference" for index in range(len(grids))]
    assert [role for _, role, _ in found] == names
    references = [name for name, role, _ in found if role == "reference"]
    expected = [f"reference {count + 1}" for count in range(len(references))]
    assert references == (["reference"] if len(references) == 1 else expected)


@pytest.mark.parametrize(("height", "width"), [(300, 3), (3, 300), (300, 270)])
def test_numbers_that_bfloat16_rounds(height, width):
    tensor = ids((0, height, width), (1, 2, width)).to(torch.bfloat16)
    assert len(tensor[: height * width, 1:].unique(dim=0)) < height * width
    assert [grid for *_, grid in parts(tensor)] == [(height, width), (2, width)]


def test_rows_and_columns_may_begin_anywhere():
    assert [grid for *_, grid in parts(ids((0, 4, 5), first=(512, 33)))] == [(4, 5)]


@pytest.mark.parametrize(
    "tensor",
    [
        # references that are told by another place in picture 0, beside it or in it
        torch.cat([ids((0, 4, 5)), ids((0, 4, 5), first=(0, 5))]),
        torch.cat([ids((0, 4, 5)), ids((0, 4, 5))]),
        torch.cat([ids((0, 4, 5)), ids((0, 2, 3), first=(4, 0))]),
        torch.cat([ids((0, 4, 5)), ids((0, 4, 5), first=(4, 5))]),
        torch.zeros(20, 3),
        ids((0, 4, 5)).flip(0),
        ids((0, 4, 5))[:, [0, 2, 1]],
        ids((0, 4, 5))[:-1],
        # rounded so much that two rows have one number
        ids((0, 4, 5), first=(512, 0)).to(torch.bfloat16),
    ],
    ids=["beside", "upon", "below", "askew", "zeros", "backwards", "columns", "cut", "rounded"],
)
def test_other_orders_are_refused(tensor):
    with pytest.raises(ValueError, match=r"expects img_ids to tell the rows .* in picture 0"):
        parts(tensor)


@pytest.mark.parametrize(
    ("pictures", "numbers"),
    [(((1, 2, 3), (2, 2, 3)), "1, 2"), (((0, 2, 3), (1, 2, 3), (0, 2, 3)), "0, 1, 0")],
    ids=["none", "two"],
)
def test_one_picture_is_generated(pictures, numbers):
    message = f"the generated picture 0 and references otherwise, got pictures {numbers}$"
    with pytest.raises(ValueError, match=message):
        parts(ids(*pictures))


def test_ids_are_read_once(monkeypatch):
    """Reading them waits for the device, and each layer asks."""
    tensor, run = ids((0, 4, 5), (1, 2, 3)), {}
    expected = parts(tensor, run)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", lambda _: pytest.fail("read again"))
        assert parts(tensor, run) == expected
    tensor[:20, 0] = 2
    with pytest.raises(ValueError, match="got pictures 2, 1"):
        parts(tensor, run)


class TestWhatIsKnown:
    """Other pipelines use the same transformers otherwise; their order is not guessed."""

    KNOWN = (
        ("flux", "dev"),
        ("chroma",),
        ("flux2", "dev"),
        ("qwen", "text"),
        ("sd3",),
        ("zimage",),
    )

    @pytest.mark.parametrize("which", KNOWN, ids=" ".join)
    def test_pipelines_and_denoisers(self, tiny, which):
        model = tiny(*which)
        name = which[0]
        for subject in (model.pipe, model.denoiser):
            layout = known_layout(subject, model.denoiser)
            assert layout.name == name
            assert "compare shares within one model" in layout.note
            assert not layout.matches("noise_refiner.0.attention")
            assert not layout.matches("transformer_blocks.0.attn2")

    @pytest.mark.parametrize("which", KNOWN, ids=" ".join)
    def test_pipelines_that_inherit(self, tiny, which):
        model = tiny(*which)
        child = type("Mine", (type(model.pipe),), {})
        subject = child(**model.pipe.components)
        known = known_layout(model.pipe, model.denoiser)
        assert known_layout(subject, model.denoiser).name == known.name

    @pytest.mark.parametrize("which", KNOWN, ids=" ".join)
    @pytest.mark.parametrize("own", ["VisualClozeGenerationPipeline", "MyPipeline"])
    def test_other_pipelines(self, tiny, which, own):
        model = tiny(*which)
        assert known_layout(type(own, (), {})(), model.denoiser) is None

    @pytest.mark.parametrize("which", KNOWN, ids=" ".join)
    def test_a_forward_of_ones_own(self, tiny, which, monkeypatch):
        model = tiny(*which)
        published = type(model.denoiser)

        class Mine(published):
            pass

        class Changed(published):
            def forward(self, *args, **kwargs):
                return super().forward(*args, **kwargs)

        monkeypatch.setattr(model.denoiser, "__class__", Mine)
        assert known_layout(model.denoiser, model.denoiser) is not None
        model.denoiser.__class__ = Changed
        assert known_layout(model.denoiser, model.denoiser) is None
        assert known_layout(model.pipe, model.denoiser) is None

    def test_every_pipeline_that_shares_a_transformer_is_decided(self, tiny):
        """A later diffusers may bring one whose order has to be looked at."""
        denoisers = {type(model.denoiser): model.denoiser for model in self.models(tiny)}
        found, unknown = set(), set()
        for name in dir(diffusers):
            if not re.match(r"(Flux|Chroma|Qwen|StableDiffusion3|VisualCloze|ZImage)", name):
                continue
            annotations = getattr(getattr(diffusers, name).__init__, "__annotations__", {})
            denoiser = denoisers.get(annotations.get("transformer"))
            if denoiser is not None and name.endswith("Pipeline"):
                layout = known_layout(type(name, (), {})(), denoiser)
                (unknown if layout is None else found).add(name)
        assert unknown == {
            "QwenImageLayeredPipeline",
            "StableDiffusion3PAGImg2ImgPipeline",
            "StableDiffusion3PAGPipeline",
            "VisualClozeGenerationPipeline",
            "VisualClozePipeline",
        }
        assert len(found) == 38

    def models(self, tiny):
        return [tiny(*which) for which in self.KNOWN]
