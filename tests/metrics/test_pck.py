"""PCK: positions of hand-made maps, and what a right, a shuffled and an empty-handed map score."""

import math
import re

import pytest
import torch

from i2am.attribution import Accumulator, AttributionMaps, Patch
from i2am.metrics import centroid, pck, peak
from i2am.testing import make_site

GRID = (16, 12)
DIAGONAL = math.hypot(*GRID)
POSITIONS = pytest.mark.parametrize("position", [peak, centroid], ids=lambda f: f.__name__)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def dot(row, column, grid=GRID):
    one = torch.zeros(grid)
    one[row, column] = 1
    return one


def centres(grid=GRID):
    """``[cells, 2]``, in reading order."""
    return torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])) + 0.5


@POSITIONS
def test_a_single_cell_is_at_its_centre(position):
    maps = torch.stack([dot(0, 0), dot(3, 11), dot(15, 2)]).unflatten(0, (3, 1))
    wanted = torch.tensor([[[0.5, 0.5]], [[3.5, 11.5]], [[15.5, 2.5]]])
    assert torch.equal(position(maps), wanted)
    assert torch.equal(position(7 * maps.double()), wanted.double())
    assert position(dot(1, 2).half()).dtype == torch.float32


def test_the_peak_is_the_first_largest_cell_and_the_centroid_the_mean():
    map_ = dot(2, 3) + dot(2, 9) + dot(8, 3)
    assert peak(map_).tolist() == [2.5, 3.5]
    torch.testing.assert_close(centroid(map_), torch.tensor([4.5, 5.5]))
    weighted = 3 * dot(0, 0) + dot(0, 4)
    torch.testing.assert_close(centroid(weighted), torch.tensor([0.5, 1.5]))
    assert centroid(torch.ones(GRID)).tolist() == [8, 6]
    assert peak(torch.ones(GRID)).tolist() == [0.5, 0.5]
    assert peak(-dot(0, 0)).tolist() == [0.5, 1.5]


@pytest.mark.parametrize(("threshold", "share"), [(0.049, 0.25), (0.05, 0.5), (0.1, 0.75), (1, 1)])
def test_pck_counts_distances_up_to_the_threshold(threshold, share):
    true = torch.tensor([[4.0, 5.0]]).expand(4, 2)
    far = torch.tensor([[0.0, 0.0], [0.0, 1.0], [-1.2, 1.6], [9.0, -9.0]])
    score = pck(true + far, true, threshold=threshold, diagonal=20)
    assert score.dtype == torch.float64
    assert score == share
    each = pck(true + far, true, threshold=threshold, diagonal=20, reduction="none")
    assert each.dtype == torch.bool
    assert each.tolist() == [number < 4 * share for number in range(4)]


def test_the_centre_is_right_as_often_as_cells_are_near_it():
    score = pck(torch.tensor([[8.0, 6.0]]).expand(192, 2), centres(), threshold=0.1, diagonal=20)
    near = ((centres() - torch.tensor([8.0, 6.0])).norm(dim=-1) <= 2).sum()
    assert near == 12
    torch.testing.assert_close(score, near.double() / 192)


def recorded(places):
    """Maps of a model whose query in cell i looks at the reference cell ``places[i]``."""
    cells = len(places)
    key = torch.eye(cells)
    query = key[places]
    accumulator = Accumulator(
        time_groups=1, regions=[Patch(i // GRID[1], i % GRID[1], GRID) for i in range(cells)]
    )
    site = make_site("up_blocks.1.attn2", GRID, GRID, heads=2)
    accumulator.add(site, query.expand(1, 2, -1, -1), key.expand(1, 2, -1, -1), group=0, scale=12.0)
    return AttributionMaps(
        accumulator.layers(), votes=accumulator.votes, rows=accumulator.rows, provenance={}
    )


def test_a_recording_of_a_perfect_model_is_right_and_a_shuffled_one_near_chance():
    cells = GRID[0] * GRID[1]
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(cells, generator=generator)
    maps = recorded(places)
    read = torch.cat([maps.specific_reference(region) for region in maps.regions])
    assert read.shape == (cells, *GRID)
    true = centres()[places]
    for position in (peak, centroid):
        assert pck(position(read), true, threshold=0.05, diagonal=DIAGONAL) == 1
    shuffled = true[torch.randperm(cells, generator=generator)]
    distance = torch.cdist(centres(), centres())
    for threshold in (0.05, 0.1):
        chance = (distance <= threshold * DIAGONAL).double().mean()
        score = pck(peak(read), shuffled, threshold=threshold, diagonal=DIAGONAL)
        # three standard deviations of a binomial
        assert abs(score - chance) < 3 * (chance * (1 - chance) / cells).sqrt()


@POSITIONS
@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (torch.ones(5), "maps must be [..., height, width], not empty, got [5]"),
        (torch.ones(2, 0, 4), "maps must be [..., height, width], not empty, got [2, 0, 4]"),
        (torch.full((1, 4, 4), torch.nan), "maps must be finite, got NaN or Inf"),
        (torch.full((1, 4, 4), torch.inf), "maps must be finite, got NaN or Inf"),
    ],
)
def test_what_is_no_map_has_no_position(position, maps, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        position(maps)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (dot(0, 0) - 0.5, "maps must hold values >= 0, got -0.5"),
        (torch.stack([dot(0, 0), torch.zeros(GRID)]), "maps must have a mass"),
    ],
)
def test_what_has_no_mass_has_no_centroid(maps, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        centroid(maps)


WRONG = {
    "predicted must be positions [..., 2], not empty, got [4, 3]": {"predicted": rand(4, 3)},
    "true must be positions [..., 2], not empty, got [0, 2]": {"true": rand(0, 2)},
    "predicted and true must have the same shape, got [4, 2] and [1, 2]": {"true": rand(1, 2)},
    "true must be finite, got NaN or Inf": {"true": torch.full((4, 2), torch.nan)},
    "predicted must be finite, got NaN or Inf": {"predicted": torch.full((4, 2), torch.inf)},
    "threshold must lie in (0, 1], got 0": {"threshold": 0},
    "threshold must lie in (0, 1], got 5": {"threshold": 5},
    "threshold must lie in (0, 1], got nan": {"threshold": math.nan},
    "diagonal must be a positive finite number, got 0": {"diagonal": 0},
    "diagonal must be a positive finite number, got inf": {"diagonal": math.inf},
    "reduction must be 'mean' or 'none', got 'sum'": {"reduction": "sum"},
}


@pytest.mark.parametrize(("message", "wrong"), WRONG.items(), ids=WRONG)
def test_wrong_input_of_pck_is_refused(message, wrong):
    right = {"predicted": rand(4, 2), "true": rand(4, 2), "threshold": 0.1, "diagonal": 20}
    with pytest.raises(ValueError, match=re.escape(message)):
        pck(**{**right, **wrong})


def test_there_is_no_default_threshold():
    with pytest.raises(TypeError, match="threshold"):
        pck(rand(4, 2), rand(4, 2), diagonal=20)
