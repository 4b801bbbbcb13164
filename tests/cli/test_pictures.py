"""Which pictures are drawn, what their titles say, and that they show the maps they name."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from i2am.attribution import picture
from i2am.cli import pictures
from i2am.cli.pictures import Scene, draw
from i2am.cli.settings import Inputs, NamedBox
from i2am.plots import contact_sheet, overlay
from i2am.plots.overlay import SIDE
from i2am.testing import make_maps, make_site

COARSE = make_site("down_blocks.0", (4, 3), (5, 4))
FINE = make_site("up_blocks.0", (8, 6), (5, 4))
MIDDLE = make_site("mid_block", (2, 2), (5, 4))
SINGLE = make_site("up_blocks.1", (8, 6), None)
OTHER_HEADS = make_site("up_blocks.2", (4, 3), (5, 4), heads=3)

BOX = NamedBox("box", top=12, left=6, height=24, width=12)


def image(width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def half_mask(width, height):
    mask = torch.zeros(height, width)
    mask[:, : width // 2] = 1
    return mask


def scene(boxes=(), preset="paper", steps=10):
    mask = Image.fromarray((half_mask(36, 48) * 255).byte().numpy())
    inputs = Inputs(image(36, 48, 0), mask, image(40, 50, 1), None, None)
    return Scene(inputs, image(18, 24, 2), tuple(boxes), steps, preset, "a model")


def record(*sites, regions=None, reference=True, **options):
    return make_maps(
        sites,
        samples=1,
        mask=half_mask(36, 48),
        reference_mask=half_mask(40, 50) if reference else None,
        regions=regions,
        **options,
    )


@pytest.fixture
def sheets(monkeypatch, tmp_path):
    """Draws, and returns what each file was made of: heading, titles, tiles, columns."""

    def run(maps, scene):
        seen = []

        def watch(tiles, titles, *, columns, heading):
            seen.append((heading, titles, tiles, columns))
            return contact_sheet(tiles, titles, columns=columns, heading=heading)

        monkeypatch.setattr(pictures, "contact_sheet", watch)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        files = draw(folder, maps, scene)
        assert sorted(path.name for path in folder.iterdir()) == sorted(files)
        return dict(zip([name for name in files if "overlay" not in name], seen, strict=True))

    return run


def test_a_full_recording_draws_every_sheet(sheets):
    region = torch.zeros(48, 36)
    region[12:36, 6:18] = 1
    drawn = sheets(record(COARSE, FINE, regions={"box": region}, steps=10), scene([BOX]))
    titles = {name: sheet[1] for name, sheet in drawn.items()}
    assert titles == {
        "overview.png": [
            "person",
            "mask: white is painted anew",
            "reference",
            "generated",
            "R2G: share of attention to the object",
            "R2G: every reference token votes",
            "R2G: only tokens in the reference mask vote",
            "G2R: all generated patches",
            "G2R: only patches in the mask",
        ],
        "r2g.png": [
            "generated",
            "R2G: share of attention to the object",
            "R2G: every reference token votes",
            "R2G: only tokens in the reference mask vote",
        ],
        "g2r.png": ["reference", "G2R: all generated patches", "G2R: only patches in the mask"],
        "time_groups.png": [
            "R2G, steps 1 to 5",
            "R2G, steps 6 to 10",
            "G2R, steps 1 to 5",
            "G2R, steps 6 to 10",
        ],
        "heads.png": ["R2G, head 0", "R2G, head 1", "G2R, head 0", "G2R, head 1"],
        "region_box.png": [
            "person, region in red",
            "generated, region in red",
            "G2R: only patches in the region",
        ],
    }
    assert all(heading.startswith("a model. ") for heading, *_ in drawn.values())
    assert "the region box" in drawn["region_box.png"][0]


def test_a_tile_shows_the_map_its_title_names_over_the_image_it_belongs_to(sheets):
    maps, over = record(COARSE, FINE), scene()
    drawn = sheets(maps, over)
    generated = np.asarray(over.generated.resize((SIDE * 3 // 4, SIDE), Image.Resampling.BICUBIC))
    reference = over.inputs.reference.resize((SIDE * 4 // 5, SIDE), Image.Resampling.BICUBIC)
    expected = {
        "r2g.png": [
            (generated, maps.reference_to_generated(votes=votes, measure=measure))
            for votes, measure in (("mask", "share"), ("uniform", "spread"), ("mask", "spread"))
        ],
        "g2r.png": [
            (np.asarray(reference), maps.generated_to_reference(weights=weights))
            for weights in ("uniform", "mask")
        ],
    }
    for name, tiles in expected.items():
        for tile, (below, map_) in zip(drawn[name][2][1:], tiles, strict=True):
            values = picture(map_[0], below.shape[:2]).numpy()
            assert np.array_equal(tile, overlay(below, values))


@pytest.mark.filterwarnings("ignore:preset 'official' is approximate")
@pytest.mark.parametrize("preset", ["paper", "official"])
def test_plain_overlays_have_the_size_of_their_image_and_nothing_else_in_it(preset, tmp_path):
    maps, over = record(COARSE, FINE), scene(preset=preset)
    draw(tmp_path, maps, over, suffix="_both")
    generated, reference = np.asarray(over.generated), np.asarray(over.inputs.reference)
    for name, below, map_ in (
        (
            "share",
            generated,
            maps.reference_to_generated(votes="mask", measure="share", preset=preset),
        ),
        ("r2g", generated, maps.reference_to_generated(preset=preset)),
        ("r2g_mask_votes", generated, maps.reference_to_generated(votes="mask", preset=preset)),
        ("g2r", reference, maps.generated_to_reference(preset=preset)),
    ):
        pixels = np.asarray(Image.open(tmp_path / f"overlay_{name}_both.png"))
        values = picture(map_[0], below.shape[:2], preset=preset).numpy()
        assert np.array_equal(pixels, overlay(below, values))


def test_mask_votes_need_reference_tokens_with_a_place(tmp_path, sheets):
    drawn = sheets(record(SINGLE), scene())
    assert not any("mask vote" in title for _, titles, *_ in drawn.values() for title in titles)
    files = draw(tmp_path, record(SINGLE), scene())
    assert [name for name in files if "overlay" in name] == ["overlay_r2g.png"]


def test_mask_votes_are_drawn_from_the_layers_that_have_a_grid(sheets):
    both = sheets(record(FINE, SINGLE), scene())["r2g.png"]
    alone = sheets(record(FINE), scene())["r2g.png"]
    assert both[1][3] == alone[1][3] == "R2G: only tokens in the reference mask vote"
    assert np.array_equal(both[2][3], alone[2][3])


def test_time_groups_and_heads_show_their_own_share(sheets):
    maps = record(COARSE, FINE, steps=6, time_groups=3)
    drawn = sheets(maps, scene(steps=6))
    for name, axis in (("time_groups.png", "time"), ("heads.png", "head")):
        tiles = drawn[name][2]
        split = maps.generated_to_reference(per=axis)[0]
        assert len(tiles) == 2 * len(split)
        over = tiles[-1].shape[:2]
        reference = np.asarray(
            scene().inputs.reference.resize(over[::-1], Image.Resampling.BICUBIC)
        )
        for tile, one in zip(tiles[len(split) :], split, strict=True):
            assert np.array_equal(tile, overlay(reference, picture(one, over).numpy()))


@pytest.mark.parametrize(
    ("steps", "groups", "titles"),
    [
        (5, 5, ["step 1", "step 2", "step 3", "step 4", "step 5"]),
        (7, 3, ["steps 1 to 3", "steps 4 to 5", "steps 6 to 7"]),
        (4, 1, ["steps 1 to 4"]),
    ],
    ids=["each", "uneven", "one"],
)
def test_titles_of_time_groups_count_the_steps_that_were_summed(sheets, steps, groups, titles):
    # the recorder sends step s to group s * groups // steps
    sizes = [sum(s * groups // steps == group for s in range(steps)) for group in range(groups)]
    said = [title.removeprefix("step ").removeprefix("steps ").split(" to ") for title in titles]
    assert [int(words[-1]) - int(words[0]) + 1 for words in said] == sizes
    drawn = sheets(record(COARSE, steps=steps, time_groups=groups), scene(steps=steps))
    assert drawn["time_groups.png"][1][:groups] == [f"R2G, {title}" for title in titles]


def test_single_token_layers_draw_one_direction_only(sheets):
    drawn = sheets(record(SINGLE, reference=False), scene())
    assert set(drawn) == {"overview.png", "r2g.png", "time_groups.png", "heads.png"}
    assert not any(title.startswith("G2R") for _, titles, *_ in drawn.values() for title in titles)


def test_g2r_is_drawn_from_the_layers_that_have_it(sheets):
    both = sheets(record(FINE, SINGLE, reference=False), scene())
    alone = sheets(record(FINE, reference=False), scene())
    for mixed, single in zip(both["g2r.png"][2], alone["g2r.png"][2], strict=True):
        assert np.array_equal(mixed, single)


def test_heads_of_layers_with_other_head_counts_are_left_out_and_it_says_so(sheets):
    drawn = sheets(record(COARSE, FINE, OTHER_HEADS), scene())
    assert "averaged over 2 of 3 layers" in drawn["heads.png"][0]
    assert len(drawn["heads.png"][1]) == 2 * 2


def test_official_preset_draws_without_the_mid_block(sheets):
    drawn = sheets(record(FINE, MIDDLE), scene(preset="official"))
    assert "averaged over 1 of 1 layers" in drawn["heads.png"][0]


@pytest.mark.parametrize(
    ("sites", "invert"), [((SINGLE,), True), ((SINGLE, FINE), False)], ids=["single", "mixed"]
)
def test_official_preset_inverts_maps_of_single_tokens_alone(sheets, sites, invert):
    maps = record(*sites, reference=False)
    below, tile = sheets(maps, scene(preset="official"))["r2g.png"][2]
    map_ = maps.reference_to_generated(preset="official")[0]
    values = picture(map_, below.shape[:2], preset="official", invert=invert).numpy()
    assert np.array_equal(tile, overlay(below, values))


def test_a_constant_map_is_called_so(sheets):
    sheet = sheets(record(make_site("a", (1, 1), (2, 2))), scene())["r2g.png"]
    assert sheet[1][2] == "R2G: every reference token votes (the same everywhere)"


def test_the_frame_of_a_region_surrounds_it_on_both_images(sheets):
    region = torch.zeros(48, 36)
    region[12:36, 6:18] = 1
    drawn = sheets(record(FINE, regions={"box": region}), scene([BOX]))
    for tile in drawn["region_box.png"][2][:2]:
        red = (tile == (255, 0, 0)).all(-1)
        rows, columns = np.where(red)
        # a quarter to three quarters down, a sixth to a half across
        height, width = tile.shape[:2]
        assert rows.min() == pytest.approx(height / 4, abs=3)
        assert rows.max() == pytest.approx(height * 3 / 4, abs=3)
        assert columns.min() == pytest.approx(width / 6, abs=3)
        assert columns.max() == pytest.approx(width / 2, abs=3)
        assert not red[height // 2, width // 3]


def test_a_ring_lies_around_the_true_place_where_it_is_known(sheets):
    region = torch.zeros(48, 36)
    region[12:36, 6:18] = 1
    maps = record(FINE, regions={"box": region})
    known = sheets(maps, scene([replace(BOX, truth=(0.25, 0.75))]))["region_box.png"]
    unknown = sheets(maps, scene([BOX]))["region_box.png"]
    assert known[1][2] == f"{unknown[1][2]}; ring: the true place"
    changed = (known[2][2] != unknown[2][2]).any(-1)
    rows, columns = np.where(changed)
    height, width = changed.shape
    assert (rows.min() + rows.max()) / 2 == pytest.approx(height / 4, abs=1)
    assert (columns.min() + columns.max()) / 2 == pytest.approx(width * 3 / 4, abs=1)
    assert not changed[height // 4, width * 3 // 4]


def test_suffix_keeps_two_halves_apart(tmp_path):
    maps = record(FINE)
    first = draw(tmp_path, maps, scene())
    second = draw(tmp_path, maps, scene(), suffix="_unconditional")
    assert not set(first) & set(second)
    assert len(list(tmp_path.iterdir())) == len(first) + len(second)


WHOLE = ["overview", "r2g", "g2r", "time_groups", "heads", "region_logo"]
NO_PLACE = ["overview", "r2g", "time_groups", "heads"]


def test_every_kind_of_recording_is_drawn(sheets, every_kind):
    drawn = sheets(every_kind, scene([replace(BOX, name="logo")]))
    word = not every_kind.sources[0].startswith("reference")
    assert [*drawn] == [f"{name}.png" for name in (NO_PLACE if word else WHOLE)]
    titles = drawn["r2g.png"][1]
    of = {"cat": '"cat"', "reference": "the object"}.get(every_kind.sources[0])
    of = of or "the object of reference 1"
    assert titles[1].startswith(f"R2G: share of attention to {of}")
    assert all(title.endswith("mean over 3 frames") for title in titles[1:]) == (
        every_kind.frames == 3
    )


def test_without_an_inpainting_mask_all_patches_look(sheets):
    drawn = sheets(make_maps([FINE], samples=1), scene())
    assert drawn["g2r.png"][1] == ["reference", "G2R: all generated patches"]
