"""`record(pairs=...)`: every patch of a run, in every form of guidance, beside the same image."""

import pytest
import torch

import i2am
from i2am.layouts import TokenLayout

GRID = (4, 3)
PATCHES = TokenLayout.cross_attention(GRID)
CELLS = [i2am.Patch(row, column, (8, 6)) for row, column in ((0, 0), (3, 4), (7, 5))]

# diffusers' own, about NumPy
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


def assert_pairs(maps):
    """Some patches as they were declared; which ones is nothing that pair maps know."""
    pairs = maps.pairs
    assert (pairs.generated_grid, pairs.reference_grid) == ((8, 6), GRID)
    assert pairs.layers == maps.layers
    for per, chosen in (((), {}), ("time", {"time": 1}), ("head", {"head": 2})):
        found = pairs.generated_to_reference(**chosen)
        for patch in CELLS:
            expected = maps.specific_reference(patch, per)
            expected = expected[:, 1 if per == "time" else 2] if per else expected
            torch.testing.assert_close(
                found[:, patch.row, patch.column], expected, rtol=1e-5, atol=1e-7
            )
    # every reference cell spreads one unit per evaluation, and so do all votes together
    votes = pairs.reference_to_generated().mean((1, 2))
    torch.testing.assert_close(votes, maps.reference_to_generated(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("asked", ["conditional", "unconditional", "both"])
@pytest.mark.parametrize(
    ("form", "order"),
    [
        ("unconditional first", ("unconditional", "conditional")),
        ("conditional first", ("conditional", "unconditional")),
        ("two calls", ("conditional", "unconditional")),
    ],
)
def test_both_halves_of_guidance(tiny, form, order, asked):
    loop = tiny.loop(3)
    plain = loop(tiny.reference(2), guidance=form)
    layout = TokenLayout.cross_attention(GRID, guidance_order=order)
    options = {"time_groups": 3, "branch": asked, "regions": CELLS}
    with i2am.record(loop, layout=layout, pairs=True, **options) as recorder:
        image = loop(tiny.reference(2), guidance=form)
    assert torch.equal(image, plain)
    branches = ["conditional", "unconditional"] if asked == "both" else [asked]
    for branch in branches:
        maps = recorder.maps(branch)
        assert maps.pairs.n_samples == 2
        assert_pairs(maps)


@pytest.mark.parametrize("attach", ["beside", "fused"])
@pytest.mark.parametrize("sums", ["native", "resized"])
def test_ways_to_attach_and_to_add_up(tiny, attach, sums):
    loop = tiny.loop(3)
    options = {"time_groups": 3, "attach": attach, "sums": sums, "regions": CELLS}
    with i2am.record(loop, layout=PATCHES, pairs=True, **options) as recorder:
        loop(tiny.reference(1))
    maps = recorder.maps()
    if sums == "resized":
        assert maps.pairs.layers == maps.layer_sums[0].site.merged
        expected = maps.specific_reference(CELLS[1], "time")
        found = torch.stack([maps.pairs.generated_to_reference(time=t) for t in range(3)], 1)
        torch.testing.assert_close(found[:, :, 3, 4], expected, rtol=1e-5, atol=1e-7)
    else:
        assert_pairs(maps)


@pytest.mark.parametrize("impl", ["reference", pytest.param("fused", marks=pytest.mark.slow)])
def test_every_implementation(tiny, impl):
    loop = tiny.loop()
    options = {"time_groups": 2, "impl": impl, "regions": CELLS}
    with i2am.record(loop, layout=PATCHES, pairs=((8, 6), GRID), **options) as recorder:
        loop(tiny.reference(1), steps=2, guidance="off")
    maps = recorder.maps()
    found = maps.pairs.generated_to_reference()
    for patch in CELLS:
        expected = maps.specific_reference(patch)
        torch.testing.assert_close(
            found[:, patch.row, patch.column], expected, rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(tiny, dtype):
    loop = tiny.loop(3).to(dtype)
    with i2am.record(loop, layout=PATCHES, pairs=True, time_groups=2, regions=CELLS) as recorder:
        loop(tiny.reference(1).to(dtype))
    assert recorder.maps().pairs.g2r.dtype == torch.float32
    for patch in CELLS:
        expected = recorder.maps().specific_reference(patch)
        found = recorder.maps().pairs.generated_to_reference()[:, patch.row, patch.column]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_masked_reference_tokens(tiny):
    loop = tiny.loop()
    mask = torch.ones(2, 13)
    mask[1, 7:] = 0
    with i2am.record(loop, layout=PATCHES, pairs=True, time_groups=1) as recorder:
        loop(tiny.reference(2), context_mask=mask)
    found = recorder.maps().pairs
    for sums in (found.g2r, found.r2g):
        assert sums[1, :, :, 6:].eq(0).all()
        assert sums[0].gt(0).all()


def test_sums_of_inference_mode_go_on_outside_of_it(tiny):
    loop = tiny.loop()
    with i2am.record(loop, layout=PATCHES, pairs=True, time_groups=1) as recorder:
        with torch.inference_mode():
            loop(tiny.reference())
        first = recorder.maps().pairs
        loop(tiny.reference())
    assert torch.equal(recorder.maps().pairs.g2r, first.g2r)


@pytest.mark.slow
def test_a_compiled_denoiser(tiny):
    loop = tiny.loop()
    expected = []
    for compiled in (False, True):
        if compiled:
            loop.unet = torch.compile(loop.unet, backend="eager")
        with i2am.record(loop, layout=PATCHES, pairs=True, time_groups=2) as recorder:
            loop(tiny.reference(), steps=2)
        expected.append(recorder.maps().pairs.r2g)
    torch.testing.assert_close(*expected)


@pytest.mark.filterwarnings("ignore:layers with a single reference token")
def test_pair_maps_without_a_reference_grid_are_missed_aloud(tiny):
    loop = tiny.loop()
    layout = TokenLayout.single_token()
    with i2am.record(loop, layout=layout, pairs=True, time_groups=1) as recorder:
        loop(tiny.reference(tokens=1))
    with pytest.warns(UserWarning, match="pair maps were asked for and there are none"):
        maps = recorder.maps()
    assert maps.pairs is None


@pytest.mark.parametrize("pairs", [7, (4, 3, 2), (-4, 3), "all"])
def test_what_is_no_grid(tiny, pairs):
    with pytest.raises(ValueError, match="pairs must be True, a generated grid"):
        i2am.record(tiny.loop(), layout=PATCHES, pairs=pairs)
