"""Grids, regions and resizing."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from i2am.attribution import (
    Box,
    Direction,
    Patch,
    as_regions,
    describe_regions,
    mask_weights,
    region_weights,
    resize,
)

SIDE = st.integers(1, 9)
GRID = st.tuples(SIDE, SIDE)
few = settings(max_examples=40)


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_directions_are_plain_strings():
    assert [*Direction] == ["reference_to_generated", "generated_to_reference"]


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=["none", "one", "two"])
def test_resize_is_torch_interpolate_over_any_leading_axes(mode, lead):
    maps = rand(*lead, 5, 7)
    expected = F.interpolate(maps.reshape(1, -1, 5, 7), (12, 4), mode=mode, align_corners=False)
    assert torch.equal(resize(maps, (12, 4), mode=mode), expected.reshape(*lead, 12, 4))


def test_bilinear_is_the_default_and_nearest_takes_the_cell_under_the_centre():
    maps = rand(4, 6)
    assert torch.equal(resize(maps, (8, 3)), resize(maps, (8, 3), mode="bilinear"))
    assert resize(torch.arange(6.0)[None], (1, 2), mode="nearest").tolist() == [[1, 4]]


@given(source=GRID, target=GRID, seed=st.integers(0, 99))
@few
def test_area_keeps_the_mean_and_the_range(source, target, seed):
    maps = rand(2, *source, seed=seed, dtype=torch.float64)
    result = resize(maps, target, mode="area")
    torch.testing.assert_close(result.mean((-2, -1)), maps.mean((-2, -1)), rtol=1e-12, atol=0)
    assert result.amin() >= maps.amin() - 1e-12
    assert result.amax() <= maps.amax() + 1e-12


def test_area_is_the_exact_mean_of_the_covered_source():
    # 3 cells over 2: each covers one and a half
    expected = [[(1 + 0.5 * 2) / 1.5, (0.5 * 2 + 4) / 1.5]]
    torch.testing.assert_close(
        resize(torch.tensor([[1.0, 2.0, 4.0]]), (1, 2), mode="area"), torch.tensor(expected)
    )
    maps = rand(12, 8)
    torch.testing.assert_close(
        resize(maps, (4, 2), mode="area"), F.adaptive_avg_pool2d(maps[None], (4, 2))[0]
    )


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "area", "nearest"])
def test_a_constant_stays_constant_and_nothing_stays_nothing(mode):
    result = resize(torch.full((3, 5), 0.25), (7, 4), mode=mode)
    torch.testing.assert_close(result, torch.full((7, 4), 0.25))
    assert resize(torch.zeros(0, 2, 3, 5), (7, 4), mode=mode).shape == (0, 2, 7, 4)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bool, torch.float32),
        (torch.uint8, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_resize_computes_in_fp32_or_better(dtype, expected):
    assert resize(torch.ones(2, 2, dtype=dtype), (3, 3)).dtype == expected
    assert resize(torch.ones(2, 2, dtype=dtype), (2, 2)).dtype == expected


@given(grid=GRID, layer=GRID, data=st.data())
@few
def test_a_patch_weighs_one_on_every_grid(grid, layer, data):
    row = data.draw(st.integers(0, grid[0] - 1))
    column = data.draw(st.integers(0, grid[1] - 1))
    weights = region_weights(Patch(row, column, grid), layer)
    assert weights.shape == (layer[0] * layer[1],)
    assert weights.dtype == torch.float32
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
    # the centre of mass of an area resize is where the patch was
    rows = (torch.arange(layer[0]) + 0.5) / layer[0]
    centre = (weights.reshape(layer).sum(1) * rows).sum().item()
    assert abs(centre - (row + 0.5) / grid[0]) <= 0.5 / layer[0] + 1e-5


def test_a_patch_on_its_own_grid_is_one_cell():
    weights = region_weights(Patch(1, 2, (3, 4)), (3, 4))
    assert weights.nonzero().tolist() == [[1 * 4 + 2]]


@given(data=st.data(), size=st.tuples(st.integers(1, 40), st.integers(1, 40)), layer=GRID)
@few
def test_a_box_weighs_what_its_pixels_weigh_as_a_mask(data, size, layer):
    top = data.draw(st.integers(0, size[0] - 1))
    left = data.draw(st.integers(0, size[1] - 1))
    height = data.draw(st.integers(1, size[0] - top))
    width = data.draw(st.integers(1, size[1] - left))
    pixels = torch.zeros(size)
    pixels[top : top + height, left : left + width] = 1
    weights = region_weights(Box(top, left, height, width, size), layer)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, region_weights(pixels, layer), rtol=1e-6, atol=1e-12)


def test_a_box_shares_its_border_cells_exactly():
    # 6 x 9 pixels on 2 x 3 cells of 3 x 3: rows 2..4 touch both, columns 3..5 fill the middle one
    weights = region_weights(Box(2, 3, 3, 3, (6, 9)), (2, 3)).reshape(2, 3)
    torch.testing.assert_close(weights, torch.tensor([[0, 1 / 3, 0], [0, 2 / 3, 0]]))
    # the size of the image costs nothing: a mask of this one would hold 10^18 pixels
    vast = region_weights(Box(0, 0, 10**9, 5 * 10**8, (10**9, 10**9)), (2, 2))
    assert vast.tolist() == [0.5, 0, 0.5, 0]


@given(grid=GRID, layer=GRID)
@few
def test_a_patch_is_the_one_cell_box_of_its_grid(grid, layer):
    row, column = grid[0] - 1, grid[1] // 2
    box = Box(row, column, 1, 1, grid)
    assert torch.equal(region_weights(Patch(row, column, grid), layer), region_weights(box, layer))


def test_regions_without_names_are_called_what_they_are():
    patch, box = Patch(3, 4, (32, 24)), Box(128, 96, 64, 32, (512, 384))
    named = as_regions([box, patch])
    assert list(named.items()) == [("128,96,64,32@512x384", box), ("3,4@32x24", patch)]
    given_names = {"collar": box, "all": torch.ones(2, 2)}
    assert as_regions(given_names) == given_names
    assert as_regions(given_names) is not given_names
    assert as_regions(None) == {}


def test_descriptions_are_equal_for_equal_regions_only():
    weights = torch.eye(3, 2)
    regions = {"cell": Patch(0, 1, (2, 2)), "hem": Box(0, 0, 1, 2, (4, 4)), "logo": weights}
    described = describe_regions(regions)
    assert described["cell"] == "0,1@2x2"
    assert described["hem"] == "0,0,1,2@4x4"
    assert re.fullmatch(r"3x2 weights, crc32 [0-9a-f]{8}", described["logo"])
    same = describe_regions({"bool": weights.bool(), "strided": weights.T.contiguous().T})
    assert set(same.values()) == {described["logo"]}
    assert describe_regions({"logo": weights + weights})["logo"] != described["logo"]


def test_region_weights_do_not_depend_on_the_scale_of_a_region():
    region = rand(6, 4)
    torch.testing.assert_close(
        region_weights(region, (3, 2)), region_weights(region * 1e-30, (3, 2))
    )
    expected = F.avg_pool2d(region[None], 2).flatten() / F.avg_pool2d(region[None], 2).sum()
    torch.testing.assert_close(region_weights(region, (3, 2)), expected)


def test_mask_weights_are_covered_shares():
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:2, :3] = True
    assert mask_weights(mask, (2, 2)).tolist() == [1, 0.5, 0, 0]
    batch = torch.stack([mask, ~mask])
    assert mask_weights(batch, (2, 2)).tolist() == [[1, 0.5, 0, 0], [0, 0.5, 1, 1]]


def test_patch_reads_as_row_column_and_grid():
    assert str(Patch(3, 4, (32, 24))) == "3,4@32x24"


def test_box_reads_as_corner_extent_and_image():
    assert str(Box(128, 96, 64, 32, (512, 384))) == "128,96,64,32@512x384"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Patch(0, 0, (0, 4)), "grid must be at least 1x1, got 0x4"),
        (lambda: Patch(3, 0, (3, 4)), "must lie on the 3x4 grid, got row 3, column 0"),
        (lambda: Patch(0, -1, (3, 4)), "got row 0, column -1"),
        (lambda: Box(0, 0, 1, 1, (4, 0)), "size must be at least 1x1, got 4x0"),
        (lambda: Box(0, 0, 0, 1, (4, 4)), "at least 1, got height 0, width 1"),
        (lambda: Box(-1, 0, 2, 1, (4, 4)), "on the 4x4 image, got rows -1 to 1, columns 0 to 1"),
        (lambda: Box(0, 3, 4, 2, (4, 4)), "on the 4x4 image, got rows 0 to 4, columns 3 to 5"),
        (lambda: as_regions([Patch(0, 0, (2, 2))] * 2), "must differ, got 0,0@2x2 twice"),
        (lambda: as_regions([torch.ones(2, 2)]), "give weights as {name: weights}.*got Tensor"),
        (lambda: as_regions({"logo": [1, 2]}), "Patch, Box or tensor, got list under 'logo'"),
        (lambda: as_regions(Patch(0, 0, (2, 2))), "sequence of Patch and Box, got Patch"),
        (lambda: resize(torch.ones(4), (2, 2)), r"maps must be .* got \[4\]"),
        (lambda: resize(torch.ones(3, 0, 4), (2, 2)), r"not empty, got \[3, 0, 4\]"),
        (lambda: resize(torch.ones(4, 4), (2, 0)), "size must be at least 1x1, got 2x0"),
        (lambda: resize(torch.ones(4, 4), (2, 2), mode="cubic"), "mode must be .* got 'cubic'"),
        (lambda: region_weights(torch.ones(1, 4, 4), (2, 2)), r"region must be \[height, width\]"),
        (lambda: region_weights(-torch.ones(4, 4), (2, 2)), "finite weights >= 0"),
        (lambda: region_weights(torch.full((2, 2), torch.nan), (2, 2)), "finite weights >= 0"),
        (lambda: region_weights(torch.zeros(4, 4), (2, 2)), "at least one weight > 0"),
        (lambda: mask_weights(torch.ones(4), (2, 2)), r"mask must be .* got \[4\]"),
        (lambda: mask_weights(torch.full((2, 2), 1.5), (2, 2)), r"values in \[0, 1\]"),
        (lambda: mask_weights(torch.full((2, 2), torch.nan), (2, 2)), r"values in \[0, 1\]"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
