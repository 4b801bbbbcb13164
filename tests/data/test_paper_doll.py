"""Paper dolls: the same scene whatever the batch, and a flow that is the truth."""

import hashlib

import pytest
import torch
import torch.nn.functional as F

from i2am.data import PaperDolls, render
from i2am.data.paper_doll import PARTS, SIZE, Scenes

HEIGHT, WIDTH = SIZE
GARMENT = range(PARTS.index("torso"), len(PARTS))


@pytest.fixture(scope="module")
def scenes():
    return render(range(64), split="test")


def equal(one, other):
    return torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))


# The batch


@pytest.mark.parametrize("name", Scenes._fields)
def test_a_scene_depends_on_its_index_and_split_only(scenes, name):
    alone, mixed = render([5], split="test"), render([40, 5, 3, 5], split="test")
    expected = getattr(scenes, name)[5]
    assert equal(getattr(alone, name)[0], expected)
    assert equal(getattr(mixed, name)[1], expected)
    assert equal(getattr(mixed, name)[3], expected)


def test_the_splits_are_disjoint_and_no_scene_repeats(scenes):
    pictures = torch.cat([scenes.image, render(range(64), split="train").image])
    digests = {hashlib.sha256(picture.numpy().tobytes()).digest() for picture in pictures}
    assert len(digests) == 128


def test_scenes_stay_what_they_were():
    # a digest would also pin the last bit of every sine; weights were trained on these pictures
    scenes = render([0, 1, 12_000], split="train")
    means = torch.stack([scenes.image.mean((1, 2, 3)), scenes.garment.mean((1, 2, 3))], dim=1)
    expected = torch.tensor([[0.33917, 0.67311], [0.42853, 0.82807], [0.69194, 0.77011]])
    torch.testing.assert_close(means, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", Scenes._fields)
def test_shapes_types_and_ranges(scenes, name):
    field = getattr(scenes, name)
    channels = {"image": 3, "garment": 3, "agnostic": 3, "pose": 3, "flow": 2}.get(name)
    assert field.shape == (64, *([channels] if channels else []), HEIGHT, WIDTH)
    assert field.is_contiguous()
    assert field.dtype == (torch.uint8 if name == "parts" else torch.float32)
    values = field[field.isfinite()]
    assert values.min() >= 0
    assert values.max() <= (len(PARTS) - 1 if name == "parts" else 1)
    if name in ("mask", "garment_mask", "garment_region"):
        assert set(values.unique().tolist()) == {0.0, 1.0}


# The truth


def sample(pictures, flow):
    grid = (flow.nan_to_num(0).flip(1) * 2 - 1).permute(0, 2, 3, 1)
    return F.grid_sample(pictures, grid, align_corners=False)


def test_flow_finds_the_colour_and_the_garment(scenes):
    shown = scenes.garment_region > 0
    # two pixels away from the outline and from what lies in front
    inside = F.max_pool2d(1 - scenes.garment_region[:, None], 5, stride=1, padding=2)[:, 0] == 0
    error = (sample(scenes.garment, scenes.flow) - scenes.image).abs().amax(dim=1)
    assert error[inside].median() < 1e-6
    # the rest are edges of the texture, sampled between pixels
    assert (error[inside] < 0.02).float().mean() > 0.85
    assert sample(scenes.garment_mask[:, None], scenes.flow)[:, 0][inside].min() > 0.99
    assert torch.equal(scenes.flow.isfinite().all(dim=1), shown)
    assert torch.equal(scenes.flow.isnan().any(dim=1), ~shown)


def test_a_flow_that_is_off_by_two_pixels_is_caught(scenes):
    inside = F.max_pool2d(1 - scenes.garment_region[:, None], 5, stride=1, padding=2)[:, 0] == 0
    textured = torch.tensor([len(picture.flatten(1).unique()) > 40 for picture in scenes.garment])
    error = (sample(scenes.garment, scenes.flow + 2 / WIDTH) - scenes.image).abs().amax(dim=1)
    right = (sample(scenes.garment, scenes.flow) - scenes.image).abs().amax(dim=1)
    inside &= textured[:, None, None]
    assert error[inside].mean() > 3 * right[inside].mean()


def test_parts_agree_with_the_region(scenes):
    garment = torch.isin(scenes.parts, torch.tensor(list(GARMENT), dtype=torch.uint8))
    assert torch.equal(garment, scenes.garment_region > 0)
    shown = [(scenes.parts == label).flatten(1).any(dim=1).float().mean() for label in GARMENT]
    torso, left, right, logo = shown
    assert torso == 1
    assert min(left, right) > 0.95
    assert 0.6 < logo < 0.95  # one garment in six has none
    # the left sleeve of a wearer who faces us is on the right
    columns = torch.arange(WIDTH).expand(HEIGHT, WIDTH)
    for parts in scenes.parts:
        at = [columns[parts == PARTS.index(f"{side} sleeve")].float() for side in ("left", "right")]
        if min(map(len, at)):
            assert at[0].mean() > at[1].mean()


def test_logos_are_large_enough_to_see(scenes):
    # at least 12 pixels from end to end, that is three latent cells, in the person's picture
    spans = []
    for parts in scenes.parts:
        rows, columns = (parts == PARTS.index("logo")).nonzero(as_tuple=True)
        if len(rows) > 0:
            spans.append(max(rows.max() - rows.min(), columns.max() - columns.min()).item() + 1)
    assert sorted(spans)[len(spans) // 10] >= 12


# The mask


def test_agnostic_is_the_image_outside_the_mask_and_grey_inside(scenes):
    hidden = scenes.mask[:, None].expand_as(scenes.image) > 0
    assert (scenes.agnostic[hidden] == 0.5).all()
    assert torch.equal(scenes.agnostic[~hidden], scenes.image[~hidden])


def test_the_mask_hides_every_trace_of_the_garment(scenes):
    assert ((scenes.garment_region > 0) & (scenes.mask == 0)).sum() == 0
    # and of edges: with another garment nothing changes outside
    swapped = render(range(64), split="test", garments=[*range(1, 64), 0])
    given = scenes.mask[:, None].expand_as(scenes.image) == 0
    assert torch.equal(scenes.image[given], swapped.image[given])


def test_a_garment_of_another_scene_leaves_the_person_as_it_is(scenes):
    own = render([3, 8], split="test")
    swapped = render([3, 8], split="test", garments=[8, 3])
    for name in ("agnostic", "pose", "mask"):
        assert torch.equal(getattr(own, name), getattr(swapped, name))
    for name in ("garment", "garment_mask"):
        assert torch.equal(getattr(own, name).flip(0), getattr(swapped, name))
    assert not torch.equal(own.image, swapped.image)
    inside = F.max_pool2d(1 - swapped.garment_region[:, None], 5, stride=1, padding=2)[:, 0] == 0
    error = (sample(swapped.garment, swapped.flow) - swapped.image).abs().amax(dim=1)
    assert error[inside].median() < 1e-6


def test_pose_shows_canonical_coordinates_on_the_body(scenes):
    surface = (scenes.pose[:, 2] - 0.5).abs() < 1e-6
    # nearly all of a garment lies on it, and red grows to the right, green downwards
    assert surface[scenes.garment_region > 0].float().mean() > 0.9
    both = surface[:, 1:, 1:] & surface[:, 1:, :-1] & surface[:, :-1, 1:]
    across = scenes.pose[:, 0, 1:, 1:] - scenes.pose[:, 0, 1:, :-1]
    down = scenes.pose[:, 1, 1:, 1:] - scenes.pose[:, 1, :-1, 1:]
    assert (across[both] > 0).all()
    assert (down[both] > 0).all()
    ground = scenes.parts == 0
    far = F.max_pool2d((~ground).float()[:, None], 5, stride=1, padding=2)[:, 0] == 0
    assert scenes.pose.amax(dim=1)[far].float().mean() < 0.02


# What a map must beat


def shares_within(scenes, share):
    """Of 16 x 12 cells that show the garment: right by same position, right by garment centre."""
    cell = HEIGHT // 16
    visible = F.avg_pool2d(scenes.garment_region[:, None], cell)
    true = F.avg_pool2d(scenes.flow.nan_to_num(0), cell) / visible.clamp(min=1e-6)
    true = true * torch.tensor([16.0, 12.0])[:, None, None]
    rows, columns = torch.arange(16) + 0.5, torch.arange(12) + 0.5
    here = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    y, x = (torch.arange(length) + 0.5 for length in SIZE)
    places = torch.stack(torch.meshgrid(y / cell, x / cell, indexing="ij"))
    weights = scenes.garment_mask[:, None]
    centre = (weights * places).sum((2, 3), keepdim=True) / weights.sum((2, 3), keepdim=True)
    chosen = visible[:, 0] > 0.5
    reach = share * (16**2 + 12**2) ** 0.5
    return [
        ((true - guess).norm(dim=1) <= reach)[chosen].float().mean().item()
        for guess in (here, centre)
    ]


def test_position_alone_is_a_weak_guess(scenes):
    same_position, centre = shares_within(scenes, 0.1)
    assert same_position <= 0.6
    assert centre <= 0.3


# The data set, and refusals


def test_the_dataset_has_the_scenes(scenes):
    dolls = PaperDolls(3, split="test")
    assert len(dolls) == 3
    for name, field in dolls[2].items():
        assert equal(field, getattr(scenes, name)[2])
    with pytest.raises(IndexError, match=r"index must be in 0\.\.2, got 3"):
        dolls[3]
    batch = next(iter(torch.utils.data.DataLoader(dolls, batch_size=3)))
    assert set(batch) == set(Scenes._fields)
    assert torch.equal(batch["image"], scenes.image[:3])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: render([0], split="valid"), "split must be one of train, test, got 'valid'"),
        (lambda: render([]), "indices must name at least one scene, got none"),
        (lambda: render([2, -1]), "indices must not be negative, got -1"),
        (lambda: render([2], garments=[-3]), "garments must not be negative, got -3"),
        (lambda: render([1, 2], garments=[1]), "garments must have one index .* got 1 for 2"),
        (lambda: PaperDolls(0), "count must be at least 1, got 0"),
        (lambda: PaperDolls(1, split="val"), "split must be one of train, test, got 'val'"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
