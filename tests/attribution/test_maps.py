"""Reading, selecting and merging recorded sums."""

import warnings
from dataclasses import replace
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

from i2am.attribution import (
    OFFICIAL,
    PAPER,
    AttributionMaps,
    Box,
    Direction,
    Patch,
    describe_regions,
    region_weights,
    resize,
)
from i2am.attribution.layers import nonfinite
from i2am.testing import make_maps, make_qkv, make_site

R2G, G2R = Direction
SITES = (
    make_site("down_blocks.0.attn2", (8, 6), (5, 4)),
    make_site("mid_block.attn2", (4, 3), (5, 4)),
    make_site("up_blocks.1.attn2", (8, 6), (3, 2)),
)
SINGLE = make_site("up_blocks.0.attn2", (4, 3), None)
SAMPLES, STEPS, GROUPS, HEADS = 2, 3, 2, 2
SUBSETS = [per for n in range(4) for per in combinations(("time", "layer", "head"), n)]
RIGHT = torch.zeros(16, 12)
RIGHT[:, 6:] = 1
SUBJECT = torch.stack([torch.zeros(10, 8), torch.ones(10, 8)])
SUBJECT[0, :4, :4] = 1
PATCH = Patch(2, 1, (4, 3))
REGIONS = {str(PATCH): PATCH, "hem": torch.rand(16, 12).round()}


def record(sites=SITES, **recording):
    return make_maps(sites, samples=SAMPLES, steps=STEPS, time_groups=GROUPS, **recording)


@pytest.fixture(scope="module")
def maps():
    return record(mask=RIGHT, reference_mask=SUBJECT, regions=REGIONS)


def attention(number, step):
    """fp64 scores of one call of `record`, `[samples, heads, queries, keys]`."""
    site = SITES[number]
    queries = site.generated_grid[0] * site.generated_grid[1]
    query, key, _ = make_qkv(
        SAMPLES, HEADS, queries, site.reference_tokens, 8, seed=number * STEPS + step
    )
    return query.double() @ key.double().mT * 8**-0.5


def expected(reduce, size, per, *, grid):
    """Eqs 5-6 and 13-14 read literally, in fp64, one resize per matrix entry's map."""
    time_axis = []
    for group in range(GROUPS):
        layer_axis = []
        for number, site in enumerate(SITES):
            steps = [s for s in range(STEPS) if s * GROUPS // STEPS == group]
            sums = sum(reduce(attention(number, step), site) for step in steps)
            layer_axis.append(resize(sums.unflatten(-1, grid(site)), size))
        time_axis.append(torch.stack(layer_axis, 1))
    result = torch.stack(time_axis, 1)  # [samples, time, layer, head, height, width]
    if "head" not in per:
        result = result.mean(3, keepdim=True)
    if "layer" not in per:
        result = result.mean(2, keepdim=True)
    if "time" not in per:
        result = result.sum(1, keepdim=True)
    return result.squeeze(
        [1 + i for i, axis in enumerate(("time", "layer", "head")) if axis not in per]
    )


@pytest.mark.parametrize("per", SUBSETS, ids="+".join)
def test_reference_to_generated_is_the_definition(maps, per):
    exact = expected(
        lambda scores, site: scores.softmax(-2).mean(-1),
        (8, 6),
        per,
        grid=lambda s: s.generated_grid,
    )
    torch.testing.assert_close(
        maps.reference_to_generated(per).double(), exact, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("per", SUBSETS, ids="+".join)
def test_generated_to_reference_is_the_definition(maps, per):
    exact = expected(
        lambda scores, site: scores.softmax(-1).mean(-2),
        (7, 9),
        per,
        grid=lambda s: s.reference_grid,
    )
    result = maps.generated_to_reference(per, size=(7, 9))
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-7)


def test_mask_weights_are_eq_17(maps):
    def eq_17(scores, site):
        inside = F.adaptive_avg_pool2d(RIGHT[None].double(), site.generated_grid).flatten()
        return (inside[:, None] * scores.softmax(-1)).sum(-2) / len(inside)

    exact = expected(eq_17, (5, 4), (), grid=lambda s: s.reference_grid)
    result = maps.generated_to_reference(weights="mask")
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-7)


def test_mask_votes_come_from_the_samples_own_reference_mask(maps):
    def masked(scores, site):
        inside = resize(SUBJECT.double(), site.reference_grid, mode="area").flatten(1)
        votes = inside / inside.sum(1, keepdim=True)
        return torch.einsum("bhij,bj->bhi", scores.softmax(-2), votes)

    exact = expected(masked, (8, 6), (), grid=lambda s: s.generated_grid)
    result = maps.reference_to_generated(votes="mask")
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-7)
    # the second reference is all subject
    torch.testing.assert_close(result[1], maps.reference_to_generated()[1])
    assert not torch.allclose(result[0], maps.reference_to_generated()[0])


@pytest.mark.parametrize("region", [PATCH, str(PATCH), "hem"], ids=["patch", "its name", "weights"])
def test_specific_reference_is_p_of_the_region(maps, region):
    weights = REGIONS[str(region)]

    def rows(scores, site):
        return region_weights(weights, site.generated_grid).double() @ scores.softmax(-1)

    exact = expected(rows, (5, 4), ("time",), grid=lambda s: s.reference_grid)
    result = maps.specific_reference(region, per="time")
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-7)


def test_a_region_is_found_under_the_name_it_was_given():
    box, other = Box(0, 6, 8, 3, (16, 12)), Patch(0, 0, (4, 3))
    # the second name lies: it is the text of another region
    regions = {"collar": box, str(PATCH): other}
    named = record(regions=regions, provenance={"regions": describe_regions(regions)})
    collar = named.specific_reference("collar")
    assert torch.equal(named.specific_reference(box), collar)
    assert torch.equal(named.specific_reference(str(box)), collar)
    assert torch.equal(named.specific_reference(other), named.specific_reference(str(PATCH)))
    assert not torch.allclose(named.specific_reference(other), collar)
    with pytest.raises(
        ValueError, match=r"collar \(0,6,8,3@16x12\), 2,1@4x3 \(0,0@4x3\); got 2,1@4x3"
    ):
        named.specific_reference(PATCH)
    (layer,) = record(SITES[:1], regions=regions).layer_sums
    assert torch.equal(
        named.select(layers=SITES[0].layer).specific_reference(box, ("time", "head")),
        layer.generated_to_reference[:, :, :, 1],
    )


def test_every_token_spreads_one_unit_per_evaluation(maps):
    for layer in maps.layer_sums:
        for sums in (
            layer.reference_to_generated[:, :, :, 0],
            layer.generated_to_reference[:, :, :, 0],
        ):
            per_group = sums.sum((-2, -1))
            wanted = torch.tensor([2.0, 1.0])[:, None].expand_as(per_group)
            torch.testing.assert_close(per_group, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("read", ["reference_to_generated", "generated_to_reference"])
@pytest.mark.parametrize("weighting", ["paper", "area"])
def test_reading_less_is_reducing_what_was_read(maps, read, weighting):
    whole = getattr(maps, read)(("head", "time", "layer"), layer_weighting=weighting)
    for per in SUBSETS:
        reduced = whole
        for axis, (name, reduce) in reversed(
            [*enumerate((("time", torch.sum), ("layer", torch.mean), ("head", torch.mean)), 1)]
        ):
            reduced = reduced if name in per else reduce(reduced, axis)
        result = getattr(maps, read)(per, layer_weighting=weighting)
        torch.testing.assert_close(result, reduced, rtol=1e-5, atol=1e-7)


def test_area_weighting_gives_every_layer_the_same_mean(maps):
    # halving by bilinear is the mean of four cells, so means are kept exactly
    means = maps.reference_to_generated("layer", size=(4, 3), layer_weighting="area").mean((-2, -1))
    torch.testing.assert_close(means, torch.full_like(means, STEPS))
    plain = maps.reference_to_generated("layer").mean((-2, -1))
    assert (plain[:, 1] > 3 * plain[:, 0]).all()


def test_the_official_preset_resizes_keys_apart_clamps_and_skips_the_mid_block():
    maps = record(keep_keys=True)

    def key_by_key(layer):
        sums = layer.reference_to_generated_by_key.sum(1)  # [samples, heads, keys, h, w]
        return resize(sums, (16, 12), mode="bicubic").clamp(min=0).mean(2)

    layers = [key_by_key(maps.layer_sums[number]) for number in (0, 2)]
    result = maps.reference_to_generated(("layer", "head"), size=(16, 12), preset="official")
    torch.testing.assert_close(result, torch.stack(layers, 1))
    both = maps.reference_to_generated(size=(16, 12), preset="official")
    torch.testing.assert_close(both, torch.stack(layers, 1).mean((1, 2)))


def test_the_official_preset_without_keys_works_per_head():
    maps = record(reference_mask=SUBJECT)
    for votes in ("uniform", "mask"):
        row = maps.votes.index(votes)
        layers = [maps.layer_sums[n].reference_to_generated[:, :, :, row].sum(1) for n in (0, 2)]
        wanted = sum(resize(s, (9, 9), mode="bicubic").clamp(min=0).mean(1) for s in layers) / 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if votes == "uniform" else "error")
            result = maps.reference_to_generated(size=(9, 9), votes=votes, preset="official")
        torch.testing.assert_close(result, wanted)


NO_PREFIX, PREFIX = {"prefix_votes": False}, {"prefix_votes": True}


@pytest.mark.parametrize(
    ("sites", "size", "recording", "lacks"),
    [
        (SITES, (9, 9), {}, r"lacks R2G per key, record\(keep_keys=True\)$"),
        (SITES, (9, 9), {"provenance": NO_PREFIX}, r"keys=True\) and the votes of prefix tokens"),
        (
            [*SITES, SINGLE],
            None,
            {"provenance": NO_PREFIX, "keep_keys": True},
            "lacks the votes of prefix tokens, a layout with prefix_votes=True$",
        ),
    ],
    ids=["keys", "both", "prefix"],
)
def test_an_approximate_official_reading_says_so_once(sites, size, recording, lacks):
    maps = record(sites, **recording)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maps.reference_to_generated(size=size)
    with pytest.warns(UserWarning, match=lacks) as caught:
        maps.reference_to_generated(size=size, preset="official")
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maps.reference_to_generated("time", size=size, preset="official")


@pytest.mark.parametrize(
    ("sites", "size", "recording"),
    [
        (SITES, (9, 9), {"provenance": PREFIX, "keep_keys": True}),
        ([SINGLE], (9, 9), {"provenance": NO_PREFIX}),
        (SITES, None, {}),
    ],
    ids=["all kept", "single token", "nothing resized"],
)
def test_an_exact_official_reading_warns_of_nothing(sites, size, recording):
    maps = record(sites, **recording)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maps.reference_to_generated(size=size, preset="official")


def warp_maps(numbers, **recording):
    names = [f"warp_blocks.{number}.transformer_blocks.0.attn2" for number in numbers]
    return record([make_site(name, (4, 3), (4, 3)) for name in names], **recording)


def test_the_official_preset_reads_one_warp_block():
    maps = warp_maps([0, 3, 4, 5, 14])
    alone = maps.select(layers="warp_blocks.4.*")
    for preset in ("official", replace(PAPER, only=("warp:4",))):
        for name in ("reference_to_generated", "generated_to_reference"):
            expected = getattr(alone, name)("time", preset=preset)
            assert torch.equal(getattr(maps, name)("time", preset=preset), expected)
    per_time = replace(OFFICIAL, only=("warp:3", "warp:4", "warp:5"))
    assert maps.generated_to_reference("layer", preset=per_time).shape[1] == 3
    assert maps.generated_to_reference("layer").shape[1] == 5


def test_warp_blocks_without_the_official_one_are_refused():
    with pytest.raises(ValueError, match=r"leaves out every layer here: warp_blocks\.0\..*, warp_"):
        warp_maps([0, 14]).generated_to_reference(preset="official")
    resized = warp_maps([3, 4], sums="resized")
    with pytest.raises(ValueError, match="preset 'mine' needs the layers apart"):
        resized.generated_to_reference(preset=replace(PAPER, name="mine", only=("warp:4",)))
    assert resized.generated_to_reference().shape == (SAMPLES, 4, 3)


def test_presets_go_by_what_the_layout_calls_a_layer():
    sites = [
        make_site("one", (4, 3), (4, 3), tags=("single",)),
        make_site("two", (4, 3), (4, 3), tags=("double", "stage:2")),
        make_site("three", (4, 3), (4, 3), tags=("stage:3",)),
        make_site("mid_block.four", (4, 3), (4, 3), tags=()),
    ]
    maps = record(sites)
    for switches, kept in (
        ({"without": ("double", "mid")}, ["one", "three", "mid_block.four"]),
        ({"only": ("stage:3",)}, ["one", "three", "mid_block.four"]),
        ({"without": ("single",), "only": ("stage:2",)}, ["two", "mid_block.four"]),
    ):
        read = maps.reference_to_generated(preset=replace(PAPER, **switches))
        assert torch.equal(read, maps.select(layers=kept).reference_to_generated())


def test_switches_can_be_mixed(maps):
    own = replace(PAPER, without=("mid",))
    chosen = maps.select(layers=["down*", "up*"])
    assert torch.equal(maps.reference_to_generated(preset=own), chosen.reference_to_generated())


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_layers_count_alike_whatever_their_heads(preset):
    sites = [SITES[0], replace(SITES[2], heads=5)]
    maps = record(sites)
    per_layer = maps.reference_to_generated("layer", preset=preset)
    torch.testing.assert_close(maps.reference_to_generated(preset=preset), per_layer.mean(1))


def test_a_single_reference_token_has_r2g_only():
    maps = record([SITES[0], SINGLE])
    assert not maps.informative
    assert maps.select(layers=SITES[0].layer).informative
    assert maps.reference_to_generated("layer").shape == (SAMPLES, 2, 8, 6)
    assert maps.directions == (R2G, G2R)
    single = maps.select(layers=SINGLE.layer)
    assert single.directions == (R2G,)
    total = single.reference_to_generated(size=(4, 3)).sum((-2, -1))
    torch.testing.assert_close(total, torch.full_like(total, STEPS))
    with pytest.raises(ValueError, match=r"does not exist .* up_blocks\.0\.attn2"):
        maps.generated_to_reference()


def test_mask_votes_need_a_reference_grid():
    maps = record([SITES[0], SINGLE], reference_mask=SUBJECT)
    with pytest.raises(
        ValueError,
        match=r"votes='mask'\) does not exist .* up_blocks\.0\.attn2; choose others with select",
    ):
        maps.reference_to_generated(votes="mask")
    patches = maps.select(layers=SITES[0].layer)
    assert not torch.equal(
        patches.reference_to_generated(votes="mask"), patches.reference_to_generated()
    )


def test_properties_and_repr(maps):
    assert (maps.n_samples, maps.time_groups) == (SAMPLES, GROUPS)
    assert maps.layers == tuple(site.layer for site in SITES)
    assert maps.votes == ("uniform", "mask")
    assert maps.regions == (str(PATCH), "hem")
    assert maps.informative
    text = repr(record([SITES[0], SINGLE], provenance={"branch": "conditional"}))
    assert "2 samples, 2 time groups, 2 layers" in text
    assert "branch conditional" in text
    assert "reference_to_generated, generated_to_reference" in text
    assert "down_blocks.0.attn2: 8x6 from 5x4, 2 heads\n" in text
    assert "up_blocks.0.attn2: 4x3 from 1 token, 2 heads, informative=False" in text
    assert "note" not in text
    assert repr(record(provenance={"note": "mixed"})).endswith("\n  note: mixed")
    # 2 samples x 2 groups x 2 heads x (48 + 20 + 12) fp32
    assert f"{2 * 2 * 2 * (48 + 20 + 12) * 4 / 2**20:.1f} MiB" in text


@pytest.mark.parametrize(
    ("samples", "rows"),
    [(1, [1]), (-1, [1]), (slice(0, 1), [0]), ([1, 0], [1, 0]), (None, [0, 1])],
    ids=str,
)
def test_select_samples(maps, samples, rows):
    chosen = maps.select(samples=samples)
    assert chosen.n_samples == len(rows)
    assert torch.equal(chosen.generated_to_reference(), maps.generated_to_reference()[rows])


def test_select_layers_by_name_and_pattern(maps):
    assert maps.select(layers="mid_block.attn2").layers == ("mid_block.attn2",)
    assert maps.select(layers=["up*", "down*"]).layers == (SITES[0].layer, SITES[2].layer)
    chosen = maps.select(layers="up*").reference_to_generated()
    assert torch.equal(chosen, maps.reference_to_generated("layer")[:, 2])


def test_merge_undoes_select(maps):
    merged = AttributionMaps.merge(maps.select(samples=i) for i in range(SAMPLES))
    for part, whole in zip(merged.layer_sums, maps.layer_sums, strict=True):
        assert torch.equal(part.reference_to_generated, whole.reference_to_generated)
        assert torch.equal(part.generated_to_reference, whole.generated_to_reference)
    assert (merged.votes, merged.rows) == (maps.votes, maps.rows)


def test_merging_keeps_provenance_whatever_the_order():
    a, b, c = (record(seed=seed, provenance={"model": "pocket", "seed": seed}) for seed in range(3))
    wanted = {"model": "pocket", "merged": [{"seed": 0}, {"seed": 1}, {"seed": 2}]}
    assert AttributionMaps.merge([a, b, c]).provenance == wanted
    left = AttributionMaps.merge([AttributionMaps.merge([a, b]), c])
    right = AttributionMaps.merge([a, AttributionMaps.merge([b, c])])
    assert left.provenance == right.provenance == wanted
    assert torch.equal(left.reference_to_generated(), right.reference_to_generated())
    assert AttributionMaps.merge([a, a]).provenance == a.provenance


def test_merging_keeps_what_regions_are_called():
    parts = []
    for seed in range(2):
        regions = {"collar": PATCH, "hem": REGIONS["hem"]}
        provenance = {"regions": describe_regions(regions), "layout": "same_grid", "seed": seed}
        parts.append(record(seed=seed, regions=regions, provenance=provenance))
    merged = AttributionMaps.merge(parts)
    assert merged.provenance["regions"] == parts[0].provenance["regions"]
    assert torch.equal(
        merged.specific_reference(PATCH)[:SAMPLES], parts[0].specific_reference(PATCH)
    )


def test_to_moves_every_tensor(maps):
    moved = maps.to("meta")
    assert moved.layer_sums[0].reference_to_generated.device.type == "meta"
    assert moved.layer_sums[0].generated_to_reference.device.type == "meta"
    assert maps.layer_sums[0].reference_to_generated.device.type == "cpu"


def test_nonfinite_names_the_place(maps):
    assert nonfinite(maps.layer_sums) == []
    broken = maps.layer_sums[1].generated_to_reference.clone()
    broken[1, 0, 1, 0, 0, 0] = torch.inf
    layers = [maps.layer_sums[0], replace(maps.layer_sums[1], generated_to_reference=broken)]
    (line,) = nonfinite(layers)
    assert "generated_to_reference of mid_block.attn2" in line
    assert "sample 1, time group 0, head 1" in line


ONE_WAY = {"directions": [R2G]}


@pytest.mark.parametrize(
    ("recording", "read", "message"),
    [
        (
            {},
            lambda m: m.reference_to_generated("step"),
            "of time, layer, head, frame, got step",
        ),
        ({}, lambda m: m.reference_to_generated(votes="mask"), "votes .* recorded: uniform"),
        ({}, lambda m: m.reference_to_generated(preset="v2"), "preset must be"),
        ({}, lambda m: m.reference_to_generated(layer_weighting="x"), "layer_weighting must be"),
        ({"directions": [G2R]}, lambda m: m.reference_to_generated(), "was not recorded"),
        (ONE_WAY, lambda m: m.generated_to_reference(), "generated_to_reference was not recorded"),
        ({}, lambda m: m.generated_to_reference(weights="mask"), r"needs record\(mask="),
        ({}, lambda m: m.generated_to_reference(weights="hem"), "weights must be 'uniform' or"),
        ({}, lambda m: m.specific_reference("hem"), "declared: none; got hem"),
        ({"regions": REGIONS}, lambda m: m.specific_reference("cap"), r"2,1@4x3, hem; got cap"),
        ({"mask": RIGHT}, lambda m: m.specific_reference("mask"), "declared: none"),
        ({}, lambda m: m.select(layers="up").layers, "got 'up'; recorded: down_blocks.0.attn2"),
        ({}, lambda m: m.select(layers=[]), "at least one layer"),
        ({}, lambda m: m.select(samples=[]), "samples must leave at least one of 2"),
        (
            {},
            lambda m: m.select(layers="mid*").reference_to_generated(preset="official"),
            "preset 'official' leaves out every layer here: mid_block.attn2$",
        ),
    ],
)
def test_refused_readings(recording, read, message):
    maps = record(**recording)
    with pytest.raises(ValueError, match=message):
        read(maps)


def test_a_sample_that_is_not_there(maps):
    with pytest.raises(IndexError):
        maps.select(samples=2)


def test_heads_of_layers_with_different_counts_are_refused():
    maps = record([SITES[0], replace(SITES[2], heads=5)])
    with pytest.raises(ValueError, match=r"2 and 5; read per='layer', or .* select\(layers"):
        maps.reference_to_generated("head")
    assert maps.select(layers="up*").reference_to_generated("head").shape == (SAMPLES, 5, 8, 6)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: record(SITES[:2]), "agree in layers"),
        (lambda: make_maps(SITES, time_groups=3), "time groups: result 0 has 2, result 1 has 3"),
        (lambda: record(reference_mask=RIGHT), "agree in votes: .* uniform, mask"),
        (lambda: record(mask=RIGHT), "agree in rows: .* uniform, mask"),
        (lambda: record([*SITES[:2], replace(SITES[2], heads=5)]), "grids, heads .* up_blocks.1"),
        (lambda: record(directions=[R2G]), "the recorded sums of down_blocks.0.attn2"),
        (lambda: record(provenance={"branch": "unconditional"}), "branch: .*unconditional"),
        (lambda: record(provenance={"layout": "same_grid"}), "agree in layout: .*same_grid"),
        (lambda: record(provenance={"prefix_votes": True}), "agree in prefix_votes: .*True"),
        (
            lambda: record(provenance={"regions": {"hem": "2,1@4x3"}}),
            "agree in regions: .*result 1 has hem: 2,1@4x3",
        ),
    ],
)
def test_results_that_do_not_merge(other, message):
    with pytest.raises(ValueError, match=message):
        AttributionMaps.merge([record(), other()])


def test_merging_nothing():
    with pytest.raises(ValueError, match="at least one AttributionMaps"):
        AttributionMaps.merge([])


def build(layers, votes=("uniform",), rows=("uniform",)):
    return AttributionMaps(layers, votes=votes, rows=rows, provenance={})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda a, b: build([]), "layers must be at least one"),
        (lambda a, b: build([a, a]), "none twice"),
        (lambda a, b: build([a], votes=()), "votes must be"),
        (lambda a, b: build([a], rows=("hem", "hem")), "rows must be"),
        (lambda a, b: build([a], votes=("uniform", "mask")), r"must be \[2, 2, 2, 2, 8, 6\], got"),
        (
            lambda a, b: build(
                [a, replace(b, generated_to_reference=b.generated_to_reference[:1])]
            ),
            r"of mid_block.attn2 must be \[2, .* got \[1, ",
        ),
        (
            lambda a, b: build([replace(a, site=replace(a.site, reference_grid=None))]),
            "no reference grid",
        ),
        (
            lambda a, b: build(
                [
                    replace(
                        a,
                        reference_to_generated=None,
                        generated_to_reference=None,
                        attention_share=None,
                    )
                ]
            ),
            "holds no sums",
        ),
    ],
)
def test_contradictory_sums(make, message):
    plain = record()
    with pytest.raises(ValueError, match=message):
        make(*plain.layer_sums[:2])
