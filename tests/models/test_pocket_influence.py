"""Does the map say what the reference did? Intervention is the judge: the garment is exchanged."""

import pytest
import torch
import torch.nn.functional as F

import i2am
from i2am.data.paper_doll import render
from i2am.models import pocket_pipeline

pytestmark = pytest.mark.slow

PEOPLE = [*range(0, 24, 2)]
GRID = (16, 12)
CELL = 8  # pixels of the 128 x 96 image


@pytest.fixture(scope="module")
def pipe():
    pipe = pocket_pipeline()
    if not pipe.trained:
        pytest.fail("the pocket model's weights are part of the package")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def scenes():
    """Held-out people, what they wear, and what they shall wear."""
    before = render(PEOPLE, split="test")
    after = render(PEOPLE, split="test", garments=[person + 101 for person in PEOPLE])
    return before, after


def generate(pipe, before, garments):
    return pipe(
        image=before.image,
        mask_image=before.mask,
        pose_image=before.pose,
        reference_image=garments,
        num_inference_steps=20,
        guidance_scale=2.0,
        output_type="pt",
        generator=[torch.Generator().manual_seed(person) for person in PEOPLE],
    ).images


@pytest.fixture(scope="module")
def recorded(pipe, scenes):
    before, after = scenes
    with i2am.record(pipe, mask=before.mask, reference_mask=after.garment_mask) as recorder:
        images = generate(pipe, before, after.garment)
    return images, recorder.maps()


def correlations(first, second):
    """Pearson's, of each sample."""
    first, second = (maps.flatten(1) - maps.flatten(1).mean(1, True) for maps in (first, second))
    return (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))


def auc(maps, inside):
    """How often a cell inside has more than one outside, for each sample."""
    values = []
    for sample, region in zip(maps.flatten(1), inside.flatten(1), strict=True):
        pairs = sample[region][:, None] - sample[~region][None]
        values.append(((pairs > 0).double() + 0.5 * (pairs == 0)).mean())
    return torch.stack(values)


def test_the_share_of_the_garment_predicts_what_the_garment_did(pipe, scenes, recorded):
    before, after = scenes
    images, maps = recorded
    others = render(PEOPLE, split="test", garments=[person + 131 for person in PEOPLE]).garment
    changed = [generate(pipe, before, garments) for garments in (others, 1 - after.garment)]
    influence = sum((image - images).abs().mean(1) for image in changed)
    influence = F.avg_pool2d(influence[:, None], CELL)[:, 0]
    read = maps.reference_to_generated
    share = correlations(read(size=GRID, measure="share", votes="mask"), influence)
    assert float(share.mean()) >= 0.88
    # neither of the paper's readings does as well
    for votes in ("uniform", "mask"):
        assert float(correlations(read(size=GRID, votes=votes), influence).mean()) < 0.8


def test_the_share_lies_on_the_shirt(scenes, recorded):
    before, after = scenes
    _, maps = recorded
    # the shirt is where the true picture differs from the input
    difference = F.avg_pool2d((after.image - before.image).abs().mean(1)[:, None], CELL)[:, 0]
    share = maps.reference_to_generated(size=GRID, measure="share", votes="mask")
    assert float(auc(share, difference > 0.02).min()) >= 0.95
