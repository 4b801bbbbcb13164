"""What is shown of a source: its layers, heads and R2G, and what they are called."""

from dataclasses import replace

import pytest
import torch

from i2am.attribution.shown import R2G, Shown
from i2am.testing import make_maps, make_site

SHARE, SPREAD = R2G("share", "uniform", "share"), R2G("r2g", "uniform", "spread")
MASKED = R2G("r2g_mask", "mask", "spread")
OBJECT = R2G("share", "mask", "share")
SINGLE = make_site("up.attn", (8, 6), None)
FINE = make_site("up.attn", (8, 6), (5, 4))
COARSE = make_site("down.attn", (4, 3), (5, 4))


def test_every_map_is_read_of_the_source_alone(every_kind):
    for source in every_kind.sources:
        shown = Shown(every_kind, source=source)
        for way in shown.ways:
            given = {"votes": way.votes, "measure": way.measure}
            of = every_kind
            if way.votes == "mask" and shown.gridless:
                of = every_kind.select(layers=["up.attn"])
            wanted = of.reference_to_generated(source=source, **given)
            assert torch.equal(shown.r2g(**given), wanted)
            assert shown.r2g("time", **given).shape == (1, 2, *wanted.shape[1:])
        for weights in shown.weights:
            of = every_kind.select(layers=["up.attn"]) if shown.gridless else every_kind
            wanted = of.generated_to_reference(source=source, weights=weights)
            assert torch.equal(shown.g2r(weights=weights), wanted)
        assert shown.has_g2r == (not shown.word) == bool(shown.weights)
        if shown.has_g2r:
            assert shown.region("logo").shape == shown.g2r().shape


def test_every_axis_that_is_named_can_be_read(every_kind):
    for source in every_kind.sources:
        shown = Shown(every_kind, source=source)
        for way in (*shown.ways, None):
            for axis in shown.axes(way):
                if way is None and shown.has_g2r:
                    found = shown.g2r(axis)
                elif way is None:
                    continue
                else:
                    found = shown.r2g(axis, votes=way.votes, measure=way.measure)
                masked = way is None or way.votes == "mask"
                layers = len(shown.layers_of(placed=masked))
                assert found.shape[1] == {"time": 2, "head": 2, "layer": layers}[axis]


@pytest.mark.parametrize(
    ("kind", "source", "ways", "axes"),
    [
        ("two references", "reference 2", (OBJECT, SPREAD, MASKED), ("time", "head", "layer")),
        ("words", "cat", (SHARE,), ("time", "head", "layer")),
        ("reference and words", "reference", (OBJECT, SPREAD, MASKED), ("time", "head", "layer")),
        ("reference and words", "hat", (SHARE,), ("time", "head", "layer")),
        ("frames", "reference", (OBJECT, SPREAD, MASKED), ("time", "head", "layer")),
        ("head counts", "reference", (OBJECT, SPREAD, MASKED), ("time", "layer")),
        ("gridless", "reference", (OBJECT, SPREAD, MASKED), ("time", "head", "layer")),
        ("resized", "reference", (OBJECT, SPREAD, MASKED), ("time", "head")),
        ("everything", "cat", (SHARE,), ("time", "head")),
    ],
)
def test_what_there_is_to_show(record, kind, source, ways, axes):
    shown = Shown(record(kind), source=source)
    assert shown.ways == ways
    assert shown.axes(ways[0]) == axes


def test_resized_spreads_beside_shares_have_no_heads(record):
    shown = Shown(record("everything"), source="reference 1")
    assert "head" in shown.axes(OBJECT)
    assert "head" not in shown.axes(SPREAD)
    with pytest.raises(ValueError, match="per='head' of measure='spread' needs heads apart"):
        shown.r2g("head", measure="spread")


def test_without_a_share_that_says_anything_the_spread_comes_first():
    # a reference that is all there is has a share of 1
    assert Shown(make_maps([FINE])).ways == (SPREAD,)
    maps = make_maps([FINE], directions=["generated_to_reference"])
    assert Shown(maps).ways == ()
    # of a word it is what there is
    word = replace(FINE, reference_grid=None, role="text", source="cat")
    assert Shown(make_maps([word])).ways == (SPREAD,)


@pytest.mark.parametrize(
    ("kind", "source", "r2g", "spread", "masked", "g2r"),
    [
        (
            "resized",
            "reference",
            "R2G: share of attention to the reference",
            "R2G: every reference token votes",
            "R2G: only tokens in the reference mask vote",
            "G2R: all generated patches",
        ),
        (
            "two references",
            "reference 2",
            "R2G: share of attention to reference 2",
            "R2G: every token of reference 2 votes",
            "R2G: only tokens in the reference mask of reference 2 vote",
            "G2R: all generated patches on reference 2",
        ),
        (
            "frames",
            "reference",
            "R2G: share of attention to the reference, mean over 3 frames",
            "R2G: every reference token votes, mean over 3 frames",
            "R2G: only tokens in the reference mask vote, mean over 3 frames",
            "G2R: all generated patches, mean over 3 frames",
        ),
    ],
)
def test_titles_name_the_source_where_there_are_others(
    record, kind, source, r2g, spread, masked, g2r
):
    shown = Shown(record(kind), source=source)
    assert shown.r2g_title(measure="share") == r2g
    assert shown.r2g_title(measure="spread") == spread
    assert shown.r2g_title("mask", "spread") == masked
    assert shown.g2r_title() == g2r


def test_words_are_named_in_quotes(record):
    shown = Shown(record("words"))
    assert (shown.source, shown.word, shown.name) == ("cat", True, '"cat"')
    assert shown.r2g_title() == 'R2G: share of attention to "cat"'
    assert (shown.placed, shown.weights, shown.single) == (None, (), False)
    beside = record("reference and words")
    assert Shown(beside).name == "the reference"
    assert Shown(beside).aim("mask") == "the object"
    assert Shown(record("everything"), source="reference 2").aim("mask") == (
        "the object of reference 2"
    )


def test_maps_per_head_come_from_layers_with_as_many_as_the_finest(record):
    maps = record("head counts")
    shown = Shown(maps)
    assert (shown.head_count, shown.alike) == (2, False)
    assert shown.heads_of == "averaged over 1 of 2 layers"
    wanted = maps.select(layers=["up.attn"])
    assert torch.equal(shown.r2g("head"), wanted.reference_to_generated("head"))
    assert torch.equal(shown.g2r("head"), wanted.generated_to_reference("head"))


def test_layers_without_a_place_count_in_what_needs_none(record):
    shown = Shown(record("gridless"))
    assert (shown.layers, shown.gridless) == (["down.attn", "up.attn"], ["down.attn"])
    assert shown.layers_of(placed=False) == ["down.attn", "up.attn"]
    assert shown.layers_of(placed=True) == ["up.attn"]
    assert shown.r2g("layer").shape[1] == 2
    assert shown.r2g("layer", votes="mask").shape[1] == 1


@pytest.mark.parametrize(
    ("sites", "preset", "invert"),
    [
        ([SINGLE], "official", True),
        ([SINGLE], "paper", False),
        ([SINGLE, COARSE], "official", False),
        ([replace(SINGLE, role="text", source="cat", informative=True)], "official", False),
    ],
)
def test_single_tokens_of_a_reference_are_inverted_by_the_official_preset(sites, preset, invert):
    shown = Shown(make_maps(sites), preset)
    assert shown.invert == shown.inverted("spread") == invert
    assert not shown.inverted("share")


def test_the_source_must_be_a_recorded_one(record):
    with pytest.raises(ValueError, match="source must be a recorded one, got 'dog'; recorded: ref"):
        Shown(record("everything"), source="dog")
    with pytest.raises(ValueError, match="preset"):
        Shown(record("words"), "best")


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        (
            "everything",
            [
                "references: reference 1, reference 2",
                "words: cat, hat",
                "frames: 3",
                "resized: 3 frames of 8x6 from 5x4 of reference 1, 2 heads, mean of 2 layers",
                "resized: 3 frames of 8x6 from 10x8 of reference 2, 2 heads, mean of 2 layers",
                "resized: 3 frames of 8x6 from 2 words, 2 heads, mean of 2 layers",
            ],
        ),
        (
            "words",
            [
                "words: cat, hat",
                "down.attn: 4x3 from 2 words, 2 heads",
                "up.attn: 8x6 from 2 words, 2 heads",
            ],
        ),
        (
            "gridless",
            [
                "down.attn: 4x3 from 1 token, 2 heads, informative=False",
                "up.attn: 8x6 from 5x4, 2 heads",
            ],
        ),
        ("head counts", ["down.attn: 4x3 from 5x4, 3 heads", "up.attn: 8x6 from 5x4, 2 heads"]),
    ],
)
def test_repr_says_what_the_maps_are_of(record, kind, lines):
    assert [line.strip() for line in repr(record(kind)).splitlines()][3:] == lines
