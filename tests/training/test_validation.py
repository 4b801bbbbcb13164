"""Validation: figures that independent runs confirm, a panel, and a model left as it was."""

import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import i2am
from i2am.data.paper_doll import Scenes, render
from i2am.metrics import masked_l1, masked_ssim
from i2am.models import POCKET, CustomPipeline
from i2am.training.attention_tv import AttentionTotalVariation
from i2am.training.validation import QUERY_GRID, validate

STEPS = 2
FIGURES = {"l1_shirt", "ssim_shirt", "l1_mean_colour", "ssim_mean_colour", "pck10"}


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return render(range(3), split="test")


@pytest.fixture
def pipeline() -> CustomPipeline:
    return POCKET.build()


def check(pipeline, scenes, folder, **options) -> dict[str, float]:
    return validate(pipeline, scenes, folder, **{"step": 1500, "inference_steps": STEPS, **options})


def generate(pipeline, scenes: Scenes, seed: int = 0, **options) -> Tensor:
    """What a caller who knows nothing of validation would generate."""
    pipeline.set_progress_bar_config(disable=True)
    settings = {
        "num_inference_steps": STEPS,
        "guidance_scale": 2.0,
        "vae_posterior": "mode",
        "output_type": "pt",
    }
    return pipeline(
        agnostic_image=scenes.agnostic,
        pose_image=scenes.pose,
        reference_image=scenes.garment,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(len(scenes.image))],
        **{**settings, **options},
    ).images


def test_figures_are_those_of_the_generated_images(pipeline, scenes, tmp_path) -> None:
    figures = check(pipeline, scenes, tmp_path, seed=5)
    assert set(figures) == FIGURES
    images = generate(pipeline, scenes, seed=5)
    region = scenes.garment_region
    expected = masked_l1(images, scenes.image, region).mean().item()
    assert figures["l1_shirt"] == pytest.approx(expected, rel=1e-6)
    expected = masked_ssim(images, scenes.image, region).mean().item()
    assert figures["ssim_shirt"] == pytest.approx(expected, abs=1e-6)
    assert check(pipeline, scenes, tmp_path, seed=5) == figures
    assert check(pipeline, scenes, tmp_path, seed=6)["l1_shirt"] != figures["l1_shirt"]


def test_the_panel_shows_what_was_generated(pipeline, scenes, tmp_path) -> None:
    check(pipeline, scenes, tmp_path / "panels")
    # whole or not at all: nothing but the panel is left
    (panel,) = (tmp_path / "panels").iterdir()
    assert panel.name == "panel-00001500.png"
    sheet = np.asarray(Image.open(panel))
    pictures = (scenes.garment, scenes.agnostic, generate(pipeline, scenes), scenes.image)
    for row in range(3):
        corners = []
        for picture in pictures:
            tile = (picture[row] * 255).round().byte().permute(1, 2, 0).numpy()
            corners.append(_find(sheet, tile.repeat(2, 0).repeat(2, 1)))
        tops, lefts = zip(*corners, strict=True)
        assert len(set(tops)) == 1
        assert list(lefts) == sorted(set(lefts))


def _find(sheet: np.ndarray, tile: np.ndarray) -> tuple[int, int]:
    height, width, _ = tile.shape
    starts = np.argwhere((sheet[: 1 - height, : 1 - width] == tile[0, 0]).all(-1))
    found = [
        (int(top), int(left))
        for top, left in starts
        # the diagonal first: most places fail there
        if (
            np.einsum("iic->ic", sheet[top:, left:][:width, :width])
            == np.einsum("iic->ic", tile[:width])
        ).all()
        and (sheet[top : top + height, left : left + width] == tile).all()
    ]
    assert len(found) == 1
    return found[0]


def test_a_scene_does_not_depend_on_its_batch(pipeline, tmp_path) -> None:
    # ten scenes are generated in two batches
    indices = range(10)
    options = {"inference_steps": 1, "guidance_scale": 1.0}
    figures = check(pipeline, render(indices, split="test"), tmp_path, **options)
    alone = [
        check(pipeline, render([index], split="test"), tmp_path, step=0, seed=index, **options)
        for index in indices
    ]
    for name in FIGURES - {"pck10"}:
        mean = sum(one[name] for one in alone) / len(alone)
        assert figures[name] == pytest.approx(mean, rel=1e-4, abs=1e-5)
    # a panel has eight rows at most
    check(pipeline, render(range(8), split="test"), tmp_path / "eight", **options)
    panels = [Image.open(path / "panel-00001500.png") for path in (tmp_path, tmp_path / "eight")]
    assert panels[0].size == panels[1].size
    assert panels[0].tobytes() == panels[1].tobytes()


def test_pck_follows_the_peaks_of_the_specific_reference_maps(pipeline, scenes, tmp_path) -> None:
    rows, columns = QUERY_GRID
    cells = list(itertools.product(range(rows), range(columns)))
    with i2am.record(
        pipeline, time_groups=1, regions=[i2am.Patch(*cell, QUERY_GRID) for cell in cells]
    ) as recorder:
        generate(pipeline, scenes)
    maps = recorder.maps()
    flow = torch.full_like(scenes.flow, torch.nan)
    for row, column in cells:
        found = maps.specific_reference(i2am.Patch(row, column, QUERY_GRID)).flatten(1).argmax(1)
        place = torch.stack([(found // 12 + 0.5) / 16, (found % 12 + 0.5) / 12], dim=1)
        flow[..., row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = place[..., None, None]
    region = torch.zeros_like(scenes.garment_region)
    region[:, 32:104, 24:72] = 1
    # cells of which only half shows garment are not asked, wherever they are said to come from
    region[:, 24:32, 24:28] = 1
    flow[:, :, 24:32] = 0
    flow = torch.where(region[:, None] > 0, flow, torch.nan)
    told = scenes._replace(flow=flow, garment_region=region)
    assert check(pipeline, told, tmp_path)["pck10"] == 1
    # 10 % of the diagonal are two cells: 1.9 rows away is near, 2.1 is not
    for axis, shift, expected in ((0, 1.9, 1.0), (0, 2.1, 0.0), (1, -1.9, 1.0), (1, -2.1, 0.0)):
        moved = flow.clone()
        moved[:, axis] += shift / QUERY_GRID[axis]
        assert check(pipeline, told._replace(flow=moved), tmp_path)["pck10"] == expected
    # one scene of three elsewhere
    moved = flow.clone()
    moved[1] += 0.5
    figures = check(pipeline, told._replace(flow=moved), tmp_path)
    assert figures["pck10"] == pytest.approx(2 / 3)


def test_the_mean_colour_is_perfect_for_a_plain_garment(pipeline, scenes, tmp_path) -> None:
    colour = torch.tensor([0.8, 0.2, 0.4])[:, None, None]
    worn, own = scenes.garment_region[:, None], scenes.garment_mask[:, None]
    plain = scenes._replace(
        image=scenes.image * (1 - worn) + colour * worn,
        garment=1 - own + colour * own,
    )
    figures = check(pipeline, plain, tmp_path)
    assert figures["l1_mean_colour"] == pytest.approx(0, abs=1e-6)
    assert figures["ssim_mean_colour"] == pytest.approx(1, abs=1e-3)  # its moments are fp32
    assert figures["l1_shirt"] > 0.05
    # the garment of a data set may have another size, and its mask either of the two
    fine = plain.garment.repeat_interleave(2, 2).repeat_interleave(2, 3)
    mask = plain.garment_mask.repeat_interleave(2, 1).repeat_interleave(2, 2)
    for cover in (plain.garment_mask, mask):
        figures = check(pipeline, plain._replace(garment=fine, garment_mask=cover), tmp_path)
        assert figures["l1_mean_colour"] == pytest.approx(0, abs=1e-6)


def test_fields_that_a_data_set_lacks_leave_their_figures_out(pipeline, scenes, tmp_path) -> None:
    fields = scenes._asdict()
    everything = check(pipeline, fields, tmp_path)

    def without(*names: str) -> dict[str, float]:
        kept = {name: values for name, values in fields.items() if name not in names}
        return check(pipeline, kept, tmp_path)

    # VITON-HD's training split, its test split, and a garment without a mask
    lacking = without("flow", "parts")
    assert lacking == {name: everything[name] for name in FIGURES - {"pck10"}}
    assert without("flow", "parts", "garment_region") == {}
    assert set(without("flow", "garment_mask")) == {"l1_shirt", "ssim_shirt"}
    assert (tmp_path / "panel-00001500.png").is_file()


def test_a_scene_without_garment_counts_nowhere(pipeline, scenes, tmp_path) -> None:
    alone = check(pipeline, Scenes(*(field[:1] for field in scenes)), tmp_path)
    region = scenes.garment_region.clone()
    region[1:] = 0
    figures = check(pipeline, scenes._replace(garment_region=region), tmp_path)
    assert figures == pytest.approx(alone, rel=1e-4)
    assert check(pipeline, scenes._replace(garment_region=0 * region), tmp_path) == {}


def _state(pipeline: CustomPipeline) -> dict[str, object]:
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    return {
        "modes": [module.training for part in modules for module in part.modules()],
        "trainable": [p.requires_grad for part in modules for p in part.parameters()],
        "processors": list(map(id, pipeline.unet.attn_processors.values())),
        "components": {name: id(part) for name, part in pipeline.components.items()},
        "scheduler": {
            name: values.tolist() if isinstance(values, Tensor | np.ndarray) else values
            for name, values in vars(pipeline.scheduler).items()
        },
        "pipeline": {
            name: value for name, value in vars(pipeline).items() if name != "_internal_dict"
        },
        "configuration": dict(pipeline.config),
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "gradients": torch.is_grad_enabled(),
    }


def test_the_model_and_the_random_states_are_left_as_they_were(pipeline, scenes, tmp_path) -> None:
    pipeline.scheduler.set_timesteps(7)
    pipeline.unet.train()
    pipeline.unet.mid_block.eval()
    pipeline.vae.requires_grad_(False)
    before = _state(pipeline)
    figures = check(pipeline, scenes, tmp_path)
    assert _state(pipeline) == before
    wrong = scenes._replace(garment=scenes.garment[:2])
    with pytest.raises(ValueError, match="reference_image"):
        check(pipeline, wrong, tmp_path)
    assert _state(pipeline) == before
    # the mode of training plays no part in the figures
    pipeline.unet.train(False)
    assert check(pipeline, scenes, tmp_path) == figures


def test_the_attention_loss_around_it_changes_nothing(pipeline, scenes, tmp_path) -> None:
    expected = check(pipeline, scenes, tmp_path)
    with (
        warnings.catch_warnings(),
        AttentionTotalVariation(pipeline.unet, reference_grid=pipeline.reference_grid),
    ):
        warnings.simplefilter("error")
        assert check(pipeline, scenes, tmp_path) == expected


def test_what_cannot_be_validated_is_refused(pipeline, scenes, tmp_path) -> None:
    fields = {name: scenes._asdict()[name] for name in ("image", "garment")}
    message = r"scenes must have image, garment, agnostic, pose, got none of \['agnostic', 'pose'\]"
    with pytest.raises(ValueError, match=message):
        check(pipeline, fields, tmp_path)
    occupied = tmp_path / "file"
    occupied.touch()
    with pytest.raises(OSError, match="exists"):
        check(pipeline, scenes, Path(occupied))
