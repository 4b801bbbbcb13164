"""The weights of the package: a map's peak lies where it should, which untrained weights cannot."""

import pytest
import torch
from accuracy import places, reading

import i2am
from i2am.data.paper_doll import render
from i2am.models import POCKET, pocket_pipeline

SHARP = "layer up_blocks.1.attentions.1.transformer_blocks.0.attn2"


@pytest.fixture(scope="module")
def scenes():
    """Four that training never saw."""
    return render(range(4), split="test")


def record(pipe, scenes):
    pipe.set_progress_bar_config(disable=True)
    asked = places.query_places(scenes)
    with i2am.record(
        pipe,
        regions=[reading.patch(cell) for cell in asked.cell.unique().tolist()],
        mask=scenes.mask,
        reference_mask=scenes.garment_mask,
    ) as recorder:
        images = pipe(
            agnostic_image=scenes.agnostic,
            pose_image=scenes.pose,
            reference_image=scenes.garment,
            num_inference_steps=10,
            guidance_scale=2.0,
            generator=[torch.Generator().manual_seed(scene) for scene in range(4)],
            output_type="pt",
        ).images
    maps = recorder.maps()
    positions = reading.read_positions(maps, asked)["peak"]
    accuracy = {
        view: places.shares(of, asked.true)
        for view, of in zip(reading.view_names(maps), positions, strict=True)
    }
    return images, maps, accuracy


@pytest.fixture(scope="module")
def trained(scenes):
    pipe = pocket_pipeline()
    assert pipe.trained
    return record(pipe, scenes)


def test_the_peak_of_a_patch_lies_on_the_place_that_it_shows(trained, scenes):
    _, _, accuracy = trained
    assert accuracy[SHARP]["10"] >= 0.97
    assert accuracy[SHARP]["5"] >= 0.9
    assert accuracy["all"]["10"] >= 0.95
    _, _, of_the_twin = record(POCKET.build(0), scenes)
    for view in (SHARP, "all"):
        assert of_the_twin[view]["10"] <= 0.3


def test_the_generated_patches_look_at_the_garment_and_not_at_its_ground(trained, scenes):
    _, maps, _ = trained
    share = reading.share_inside(maps.generated_to_reference(weights="mask"), scenes.garment_mask)
    assert (share > 1.3 * scenes.garment_mask.mean((1, 2))).all()


def test_the_shirt_has_the_garments_colours(trained, scenes):
    images, _, _ = trained

    def colour(pictures, region):
        region = region[:, None]
        return (pictures * region).sum((2, 3)) / region.sum((2, 3))

    generated = colour(images, scenes.garment_region)
    true = colour(scenes.image, scenes.garment_region)
    error = (generated - true).abs().mean(1)
    assert (error < 0.08).all()
