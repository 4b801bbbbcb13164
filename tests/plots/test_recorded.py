"""Figures of recordings: which maps go where, and what cannot be drawn."""

import pytest
import torch

from i2am.attribution import OFFICIAL, PAPER, Box, Patch
from i2am.attribution.pictures import region_box
from i2am.attribution.shown import Shown
from i2am.plots import recorded as module
from i2am.plots import splits
from i2am.plots.recorded import FIGURES, FURTHER, NUMBERS, Recorded, figure, lacks
from i2am.testing import make_maps, make_site

COARSE = make_site("down_blocks.0", (4, 3), (5, 4))
FINE = make_site("up_blocks.0", (8, 6), (5, 4))
MIDDLE = make_site("mid_block", (2, 2), (5, 4))
SINGLE = make_site("up_blocks.1", (8, 6), None)
OTHER_HEADS = make_site("up_blocks.2", (4, 3), (5, 4), heads=3)

REFERENCE = (40, 50)
LOGO = Patch(2, 1, (8, 6))


def record(*sites, **options):
    mask = torch.zeros(48, 36)
    mask[:, :18] = 1
    given = {"samples": 1, "steps": 4, "mask": mask, "provenance": {"steps": 4}, **options}
    return make_maps(sites, reference_mask=mask if sites != (SINGLE,) else None, **given)


@pytest.fixture
def calls(monkeypatch):
    """What the figure functions were called with, without drawing."""
    seen = []
    for room, names in (
        (splits, ("time_groups", "heads", "layers", "reference_maps")),
        (module.comparisons, ("time_and_head", "models")),
        (module.pointing, ("specific_reference",)),
    ):
        for name in names:
            monkeypatch.setattr(
                room, name, lambda *args, _name=name, **kwargs: seen.append((_name, args, kwargs))
            )
    return seen


@pytest.fixture
def one(image):
    def make(maps, **options):
        return Recorded(maps, image(), image(REFERENCE), **options)

    return make


def test_every_number_and_name_makes_its_figure(calls, one):
    maps = record(COARSE, FINE, regions={"logo": LOGO})
    for which in (*NUMBERS, *map(int, NUMBERS), *FIGURES):
        figure(which, [one(maps)] * (2 if which == "models" else 1))
    names = [name for name, *_ in calls]
    assert names == [*NUMBERS.values(), *NUMBERS.values(), *FIGURES]


@pytest.mark.parametrize("votes", ["uniform", "mask"])
def test_figures_draw_the_readings_they_name(calls, one, votes):
    provenance = {"steps": 4, "regions": {"logo": str(LOGO)}}
    maps = record(COARSE, FINE, regions={"logo": LOGO}, provenance=provenance)
    r2g = {"votes": votes}
    g2r = {"weights": votes}
    for which in FIGURES[:-1]:
        figure(which, [one(maps)], votes=votes, weights=votes)
    drawn = {name: (args, kwargs) for name, args, kwargs in calls}

    def same(found, wanted):
        assert torch.equal(found, wanted[0])

    same(drawn["time_and_head"][0][1][0], maps.reference_to_generated(**r2g))
    same(drawn["time_and_head"][1]["reference_maps"][0], maps.generated_to_reference(**g2r))
    same(drawn["time_groups"][0][1][0], maps.reference_to_generated("time", **r2g))
    assert drawn["time_groups"][1]["steps"] == [4]
    same(drawn["heads"][0][1][0], maps.reference_to_generated("head", **r2g))
    same(drawn["reference_maps"][0][1], maps.generated_to_reference("time", **g2r))
    same(drawn["reference_maps"][0][2], maps.generated_to_reference("head", **g2r))
    same(drawn["layers"][0][1][0], maps.reference_to_generated("layer", **r2g))
    same(drawn["layers"][0][1][1], maps.generated_to_reference("layer", **g2r))
    assert drawn["layers"][0][2] == [["down_blocks.0", "up_blocks.0"]] * 2
    args, kwargs = drawn["specific_reference"]
    assert torch.equal(args[2], maps.specific_reference("logo"))
    # row 2, column 1 of 8 x 6 on 48 x 36 pixels
    assert args[3] == [(12, 6, 6, 6)]
    assert kwargs["names"] == ("logo",)


def test_several_recordings_are_rows_and_one_direction_needs_all(calls, one):
    both = [one(record(FINE), label="a"), one(record(SINGLE), label="b")]
    figure("time_and_head", both)
    figure("models", both)
    (_, args, kwargs), (_, names, columns) = calls
    assert kwargs["labels"] == ["a", "b"]
    assert len(args[1]) == 2
    assert "reference_maps" not in kwargs
    assert names[0] == ["a", "b"]
    assert torch.is_tensor(columns["reference_maps"][0])
    assert columns["reference_maps"][1] is None


def test_a_direction_that_was_not_recorded_is_left_out(calls, one):
    maps = make_maps([FINE], samples=1, directions=["reference_to_generated"])
    assert lacks("reference_maps", [one(maps)]) == "G2R was not recorded"
    figure("time_and_head", [one(maps)])
    figure("layers", [one(maps)])
    (_, _, whole), (_, (images, *_), _) = calls
    assert "reference_maps" not in whole
    assert len(images) == 1


def test_layers_of_both_kinds_have_their_own_names(calls, one):
    figure("layers", [one(record(FINE, SINGLE))])
    _, (images, maps, names), _ = calls[0]
    assert names == [["up_blocks.0", "up_blocks.1"], ["up_blocks.0"]]
    assert [len(row) for row in maps] == [2, 1]
    assert images[1].shape == (*REFERENCE, 3)


@pytest.mark.parametrize("preset", [OFFICIAL, PAPER], ids=["official", "paper"])
def test_single_tokens_are_inverted_by_the_official_preset_alone(calls, one, preset):
    maps = record(SINGLE)
    figure("heads", [one(maps)], preset=preset)
    raw = maps.reference_to_generated("head", preset=preset)[0]
    assert torch.equal(calls[0][1][1][0], -raw if preset is OFFICIAL else raw)


def test_heads_come_from_the_layers_that_have_as_many_as_the_finest(calls, one):
    reading = Shown(record(COARSE, FINE, OTHER_HEADS))
    assert reading.heads_of == "averaged over 2 of 3 layers"
    assert reading.head_count == 2
    figure("heads", [one(record(COARSE, FINE, OTHER_HEADS))])
    wanted = record(COARSE, FINE, OTHER_HEADS).select(layers=["down_blocks.0", "up_blocks.0"])
    assert torch.equal(calls[0][1][1][0], wanted.reference_to_generated("head")[0])
    assert Shown(record(FINE, MIDDLE), OFFICIAL).heads_of == "averaged over 1 of 1 layers"


def test_a_region_covers_what_it_was_declared_as():
    regions = {"patch": LOGO, "box": Box(12, 6, 24, 9, (48, 36)), "free": torch.ones(48, 36)}
    provenance = {"regions": {"patch": "2,1@8x6", "box": "12,6,24,9@48x36", "free": "weights"}}
    maps = record(FINE, regions=regions, provenance=provenance)
    assert region_box(maps.provenance, "patch") == (2 / 8, 1 / 6, 1 / 8, 1 / 6)
    assert region_box(maps.provenance, "box") == (0.25, 6 / 36, 0.5, 0.25)
    assert region_box(maps.provenance, "free") is None
    # regions of a list are called what they are
    assert region_box(record(FINE, regions={str(LOGO): LOGO}).provenance, "2,1@8x6") == (
        0.25,
        1 / 6,
        1 / 8,
        1 / 6,
    )


def test_plot_draws_one_sample_with_what_it_was_told(image):
    maps = record(COARSE, FINE, samples=2)
    made = maps.plot(
        6, generated=image(), sample=1, votes="mask", style="paper", shared=True, heading="heads"
    )
    raw = maps.reference_to_generated("head", votes="mask")[1]
    wanted = splits.heads(image(), raw, style="paper", shared=True)
    assert made.get_suptitle() == "heads"
    pairs = zip(made.axes[:-1], wanted.axes[:-1], strict=True)
    assert all((a.images[0].get_array() == b.images[0].get_array()).all() for a, b in pairs)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        pytest.param(
            lambda maps, image: maps.plot(3), r"which must be 4 to 9 or one of time_and", id="which"
        ),
        pytest.param(
            lambda maps, image: maps.plot("heads"),
            r"generated must be the image that the maps lie on, got none",
            id="no-image",
        ),
        pytest.param(
            lambda maps, image: maps.plot(4, generated=image),
            r"reference must be the image",
            id="no-reference",
        ),
        pytest.param(
            lambda maps, image: maps.plot(6, generated=image / 255),
            r"generated must be a uint8 picture",
            id="float-image",
        ),
        pytest.param(
            lambda maps, image: maps.plot("models", generated=image),
            r"which='models' cannot be drawn, because it compares two recordings or more",
            id="models",
        ),
        pytest.param(
            lambda maps, image: maps.plot(9, generated=image, reference=image),
            r"cannot be drawn, because no region was recorded",
            id="no-region",
        ),
        pytest.param(
            lambda maps, image: maps.plot(4, generated=image, reference=image, shared=True),
            r"shared must be left out for time_and_head",
            id="shared",
        ),
        pytest.param(
            lambda maps, image: maps.plot(5, generated=image, votes="all"),
            r"votes must be recorded ones, got 'all'",
            id="votes",
        ),
        pytest.param(lambda maps, image: figure(4, []), r"recorded must hold", id="none"),
        pytest.param(
            lambda maps, image: Recorded(record(FINE, samples=2)),
            r"maps must be of one sample, got 2",
            id="samples",
        ),
    ],
)
def test_refusals(call, match, image):
    with pytest.raises(ValueError, match=match):
        call(record(FINE), image())


def test_what_cannot_be_drawn_has_a_reason(one):
    single, plain = one(record(SINGLE)), one(record(FINE))
    assert lacks("reference_maps", [single]) == "no layer has reference patches"
    assert lacks("specific_reference", [single]) == "no layer has reference patches"
    assert lacks("layers", [plain, plain]) == "it shows a single recording"
    assert all(lacks(which, [plain]) is None for which in ("time_and_head", "heads", "layers"))


def test_nan_maps_are_refused_by_name(one):
    maps = record(FINE)
    maps.layer_sums[0].reference_to_generated[0, 0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"maps\[0\] must be finite"):
        figure("heads", [one(maps)])


@pytest.mark.parametrize("which", [*FIGURES, *FURTHER])
def test_every_source_of_every_kind_is_drawn_or_refused_with_the_reason(every_kind, image, which):
    given = {"generated": image(), "reference": image(REFERENCE)}
    for source in every_kind.sources:
        reason = lacks(which, [Recorded(every_kind)], source)
        if reason is None:
            assert every_kind.plot(which, source=source, **given).axes
            continue
        with pytest.raises(ValueError, match=r"cannot be drawn, because") as raised:
            every_kind.plot(which, source=source, **given)
        assert str(raised.value).endswith(f"because {reason}")


@pytest.mark.parametrize(
    ("kind", "which", "source", "reason"),
    [
        ("words", "reference_maps", "cat", 'the word "cat" has no place on a reference'),
        ("words", "words", "cat", None),
        ("words", "heads", "hat", None),
        ("two references", "specific_reference", "reference 2", None),
        ("two references", "words", None, "no words of the prompt were recorded, record(words="),
        ("frames", "frames", None, None),
        ("head counts", "frames", None, "it is of a picture, which has one frame"),
        ("head counts", "reference_maps", None, None),
        ("gridless", "layers", None, None),
        ("resized", "layers", None, "layers were added up while recording (sums='resized')"),
        ("everything", "frames", "cat", None),
    ],
)
def test_why_a_figure_of_a_source_cannot_be_made(record, kind, which, source, reason):
    found = lacks(which, [Recorded(record(kind))], source)
    assert found == reason or found.startswith(reason)


def test_models_are_compared_by_a_reference_and_by_no_word(record, image):
    maps = record("reference and words")
    pair = [Recorded(maps, image(), image(REFERENCE)) for _ in range(2)]
    assert figure("models", pair).axes
    with pytest.raises(ValueError, match='because the word "cat" has no place on a reference'):
        figure("models", pair, source="cat")


@pytest.mark.parametrize(
    ("kind", "which", "source", "heading"),
    [
        ("resized", "heads", None, ""),
        ("two references", "heads", None, "R2G: share of attention to reference 1"),
        ("two references", "reference_maps", "reference 2", "G2R: all generated patches on refer"),
        ("words", "time_groups", "hat", 'R2G: share of attention to "hat"'),
        ("reference and words", "words", None, "R2G: share of attention to each word"),
        ("frames", "heads", None, "R2G: every reference token votes, mean over 3 frames"),
        # frames apart are no mean
        ("frames", "frames", None, "R2G: every reference token votes"),
    ],
)
def test_the_heading_says_what_could_be_taken_for_something_else(
    record, image, kind, which, source, heading
):
    given = {"generated": image(), "reference": image(REFERENCE), "source": source}
    found = record(kind).plot(which, **given).get_suptitle()
    assert found.startswith(heading)
    assert bool(found) == bool(heading)
    assert ("frames" in found) == ("frames" in heading)


def test_words_and_frames_have_a_map_each(record, image, panels):
    maps = record("everything")
    (words,) = panels(maps.plot("words", generated=image()))
    assert [title for title, _ in words] == ["generated", "cat", "hat"]
    wanted = panels(splits.strip(image(), torch.cat([*maps.words.values()]), ["cat", "hat"]))
    pairs = zip(words, wanted[0], strict=True)
    assert all((one == other).all() for (_, one), (_, other) in pairs)
    (frames,) = panels(maps.plot("frames", generated=image(), source="hat"))
    assert [title for title, _ in frames[1:]] == [f"latent frame {number}" for number in range(3)]
