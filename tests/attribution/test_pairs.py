"""Pair maps: what a declared patch or the mask of a cell would have shown, for all of them."""

import json
import math

import pytest
import torch
from safetensors import safe_open

from i2am.attribution import (
    Accumulator,
    AttributionMaps,
    PairMaps,
    Patch,
    load_maps,
    pair_sums,
    resize,
)
from i2am.attribution.layers import tensors
from i2am.testing import make_maps, make_qkv, make_site

FINE = make_site("up.attn2", (8, 6), (6, 4))
COARSE = make_site("down.attn2", (4, 3), (6, 4))
ODD = make_site("odd.attn2", (5, 3), (3, 3))
SINGLE = make_site("single.attn2", (8, 6), None)
MANY = make_site("many.attn2", (4, 3), (6, 4), heads=4)
SITES = [COARSE, FINE, ODD]
PER = {(): {}, "time": {"time": 1}, "head": {"head": 1}}


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=3e-6, atol=1e-8)


def patches(grid):
    return [Patch(row, column, grid) for row in range(grid[0]) for column in range(grid[1])]


def cell_mask(grid, row, column):
    mask = torch.zeros(grid)
    mask[row, column] = 1
    return mask


def make_pairs(samples=2, time_groups=2, heads=3, generated=(2, 3), reference=(1, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, time_groups + heads, math.prod(generated), math.prod(reference))
    g2r, r2g = torch.rand(2, *shape, generator=generator)
    return PairMaps(generated, reference, time_groups, heads, ("a",), g2r, r2g)


# --- what is recorded -----------------------------------------------------------------------------

GRIDS = {
    "the finest": (True, (8, 6)),
    "coarser than most layers": ((4, 3), (4, 3)),
    "that of no layer": ((3, 5), (3, 5)),
    "finer than any layer": (((9, 7), (6, 4)), (9, 7)),
}


@pytest.mark.parametrize(("pairs", "grid"), GRIDS.values(), ids=GRIDS)
def test_every_patch_is_what_it_would_have_been_as_a_declared_region(pairs, grid):
    maps = make_maps(SITES, pairs=pairs, regions=patches(grid))
    assert (maps.pairs.generated_grid, maps.pairs.reference_grid) == (grid, (6, 4))
    assert maps.pairs.layers == maps.layers
    for per, chosen in PER.items():
        found = maps.pairs.generated_to_reference(**chosen)
        assert found.shape == (2, *grid, 6, 4)
        for patch in patches(grid):
            expected = maps.specific_reference(patch, per, size=(6, 4))
            same(found[:, patch.row, patch.column], expected[:, 1] if per else expected)


@pytest.mark.parametrize("grids", [((8, 6), (6, 4)), ((4, 3), (3, 2)), ((8, 6), (4, 5))], ids=str)
def test_every_reference_cell_goes_where_its_mask_alone_would_vote(grids):
    # as a mask, so that no other mask of the batch is there
    pairs = make_maps(SITES, pairs=grids).pairs
    for row in range(grids[1][0]):
        for column in range(grids[1][1]):
            masked = make_maps(SITES, reference_mask=cell_mask(grids[1], row, column))
            for per, chosen in PER.items():
                # a layer that is pooled on the way gives area means, as a map read in area mode
                expected = sum(
                    pooled(
                        masked.select(layers=site.layer).reference_to_generated(per, votes="mask"),
                        grids[0],
                    )
                    for site in SITES
                ) / len(SITES)
                found = pairs.reference_to_generated(**chosen)[:, row, column]
                same(found, expected[:, 1] if per else expected)


def pooled(maps, grid):
    finer = math.prod(maps.shape[-2:]) > math.prod(grid)
    return resize(maps, grid, mode="area" if finer else "bilinear")


def test_grids_are_halved_until_they_are_coarse_enough(monkeypatch):
    monkeypatch.setattr(pair_sums, "CELLS", 12)
    sites = [COARSE, FINE]
    maps = make_maps(sites, pairs=True, regions=patches((4, 3)))
    pairs = maps.pairs
    assert (pairs.generated_grid, pairs.reference_grid) == ((4, 3), (3, 2))
    for patch in patches((4, 3)):
        expected = resize(maps.specific_reference(patch), (3, 2), mode="area")
        same(pairs.generated_to_reference()[:, patch.row, patch.column], expected)
    for row, column in ((0, 0), (2, 1)):
        masked = make_maps(sites, reference_mask=cell_mask((3, 2), row, column))
        # halving an even grid is the same bilinearly
        expected = masked.reference_to_generated(votes="mask", size=(4, 3))
        same(pairs.reference_to_generated()[:, row, column], expected)


@pytest.mark.parametrize(
    ("grid", "halved"),
    [
        ((32, 24), (32, 24)),
        ((32, 32), (32, 32)),
        ((64, 48), (32, 24)),
        ((128, 96), (32, 24)),
        ((37, 28), (19, 14)),
        ((1, 4096), (1, 1024)),
    ],
    ids=str,
)
def test_the_grid_that_is_chosen(grid, halved):
    assert pair_sums._pooled(grid, None) == halved


def test_prefix_tokens_take_their_share_and_are_no_cells():
    accumulator = Accumulator(time_groups=1, pairs=True, regions=patches((4, 3)))
    index = torch.arange(24) + 3
    for number, reference in enumerate((slice(3, 27), index)):
        query, key, _ = make_qkv(2, 2, 12, 30, 8, seed=number)
        bias = torch.zeros(2, 1, 1, 30)
        bias[1, ..., :9] = -torch.inf
        accumulator.add(COARSE, query, key, group=0, reference=reference, bias=bias)
        accumulator.add(COARSE, query, key, group=0, reference=reference, bias=bias.isfinite())
    maps = of(accumulator)
    found = maps.pairs.generated_to_reference()
    for patch in patches((4, 3)):
        same(found[:, patch.row, patch.column], maps.specific_reference(patch))
    assert found[1].flatten(2)[..., :6].eq(0).all()
    assert found.sum((-2, -1)).lt(4).all()


def test_layers_without_a_reference_grid_do_not_take_part():
    maps = make_maps([*SITES, SINGLE], pairs=True)
    assert maps.pairs.layers == tuple(site.layer for site in SITES)
    plain = make_maps(SITES, pairs=True)
    # other queries and keys, as many
    assert maps.pairs.g2r.shape == plain.pairs.g2r.shape
    assert make_maps([SINGLE], pairs=True).pairs is None
    assert make_maps(SITES).pairs is None


@pytest.mark.parametrize("sites", [[COARSE, MANY, FINE], [MANY, COARSE]], ids=len)
def test_layers_with_different_numbers_of_heads_have_no_heads_apart(sites):
    maps = make_maps(sites, pairs=(4, 3), regions=[Patch(1, 2, (4, 3))])
    assert maps.pairs.heads == 0
    assert maps.pairs.g2r.shape[1] == maps.time_groups
    for per, chosen in list(PER.items())[:2]:
        found = maps.pairs.generated_to_reference(**chosen)[:, 1, 2]
        expected = maps.specific_reference(Patch(1, 2, (4, 3)), per, size=(6, 4))
        same(found, expected[:, 1] if per else expected)
    with pytest.raises(ValueError, match="head must be None, got 0: the layers have different"):
        maps.pairs.generated_to_reference(head=0)


def test_resized_sums_and_one_direction_change_nothing():
    expected = make_maps(SITES, pairs=True).pairs
    for options in ({"sums": "resized"}, {"directions": ["reference_to_generated"]}):
        found = make_maps(SITES, pairs=True, **options).pairs
        assert torch.equal(found.g2r, expected.g2r)
        assert torch.equal(found.r2g, expected.r2g)


@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_every_implementation(impl):
    options = {"pairs": ((2, 3), (3, 2)), "samples": 1, "steps": 1, "time_groups": 1}
    expected = make_maps([COARSE, ODD], impl="streaming", **options).pairs
    found = make_maps([COARSE, ODD], impl=impl, **options).pairs
    torch.testing.assert_close(found.g2r, expected.g2r, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.r2g, expected.r2g, rtol=1e-5, atol=1e-7)


def test_equal_runs_give_equal_bits():
    first, second = (make_maps(SITES, pairs=True).pairs for _ in range(2))
    assert torch.equal(first.g2r, second.g2r)
    assert torch.equal(first.r2g, second.r2g)


def test_an_unresolved_recording_resolves_to_the_same():
    options = {"time_groups": 2, "pairs": True}
    direct, unresolved = Accumulator(**options), Accumulator(**options, unresolved=True)
    resolved = None
    for evaluation in range(3):
        for number, site in enumerate(SITES):
            shape = (4, 2, math.prod(site.generated_grid), site.reference_tokens, 8)
            query, key, _ = make_qkv(*shape, seed=10 * evaluation + number)
            direct.add(site, query[2:], key[2:], group=evaluation // 2)
            if resolved is None:
                unresolved.add(site, query, key, group=0)
            else:
                resolved.add(site, query[2:], key[2:], group=evaluation // 2)
        resolved = resolved or unresolved.resolve(slice(2, 4))
    expected, found = direct.pairs(), resolved.pairs()
    assert found.n_samples == 2
    same(found.g2r, expected.g2r)
    same(found.r2g, expected.r2g)
    assert unresolved.pairs().n_samples == 4


def test_what_was_read_is_a_copy():
    accumulator = Accumulator(time_groups=1, pairs=True)
    query, key, _ = make_qkv(1, 2, 48, 24, 8)
    accumulator.add(FINE, query, key, group=0)
    before = accumulator.pairs()
    kept = before.g2r.clone()
    accumulator.add(FINE, query, key, group=0)
    assert torch.equal(before.g2r, kept)
    same(accumulator.pairs().g2r, 2 * kept)


def test_what_stays_is_a_third_more_than_the_result_whatever_the_number_of_layers():
    def held(count):
        sites = [
            make_site(f"{level}.{number}", (8 >> level, 8 >> level), (4, 4))
            for level in range(3)
            for number in range(count)
        ]
        accumulator = Accumulator(time_groups=2, pairs=True)
        for site in sites:
            cells = math.prod(site.generated_grid)
            for group in range(2):
                query, key, _ = make_qkv(1, 2, cells, 16, 8)
                accumulator.add(site, query, key, group=group)
        levels = accumulator._pairs._levels.values()
        pairs = [pair for level in levels for pair in (level.mean, level.heads)]
        return sum(sums.nbytes for pair in pairs for sums in pair), accumulator.pairs().nbytes

    for count in (1, 4):
        stays, result = held(count)
        assert result == 2 * (2 + 2) * 64 * 16 * 4
        assert stays == result * (1 + 1 / 4 + 1 / 16)


@pytest.mark.parametrize(
    "pairs", [3, "finest", (8,), (8, 6, 4), (0, 6), (8.0, 6), ((8, 6), 4), ((8, 6), (0, 4))]
)
def test_what_is_no_grid(pairs):
    with pytest.raises(ValueError, match=r"pairs must be True, a generated grid \(height, width\)"):
        Accumulator(pairs=pairs)


# --- reading --------------------------------------------------------------------------------------


def test_time_groups_add_up_and_heads_average_to_the_whole():
    pairs = make_maps(SITES, pairs=True, steps=4).pairs
    for read in (pairs.generated_to_reference, pairs.reference_to_generated):
        whole = read()
        same(sum(read(time=group) for group in range(2)), whole)
        same(sum(read(head=head) for head in range(2)) / 2, whole)
        assert torch.equal(read(time=-1), read(time=1))


def test_axes_of_a_reading():
    pairs = make_pairs()
    assert pairs.n_samples == 2
    assert pairs.nbytes == 2 * pairs.g2r.nbytes
    one = pairs.generated_to_reference(time=1)
    assert one.shape == (2, 2, 3, 1, 2)
    assert one[1, 0, 2, 0, 1] == pairs.g2r[1, 1, 2, 1]
    other = pairs.reference_to_generated(head=2)
    assert other.shape == (2, 1, 2, 2, 3)
    assert other[0, 0, 1, 1, 0] == pairs.r2g[0, 4, 3, 1]


@pytest.mark.parametrize(
    ("chosen", "error", "message"),
    [
        ({"time": 0, "head": 0}, ValueError, "time and head must not both be given"),
        ({"time": 2}, IndexError, "time must be one of 2, 0 to 1, got 2"),
        ({"head": -4}, IndexError, "head must be one of 3, 0 to 2, got -4"),
    ],
)
@pytest.mark.parametrize("direction", ["generated_to_reference", "reference_to_generated"])
def test_readings_that_are_refused(direction, chosen, error, message):
    with pytest.raises(error, match=message):
        getattr(make_pairs(), direction)(**chosen)


@pytest.mark.parametrize("name", ["g2r", "r2g"])
def test_shapes_that_contradict_the_grids(name):
    pairs = make_pairs()
    fields = {**vars(pairs), name: getattr(pairs, name)[:, 1:]}
    with pytest.raises(ValueError, match=r"r must be \[2, 5, 6, 2\]|r2g must be|g2r must be"):
        PairMaps(**fields)


@pytest.mark.parametrize("per", PER, ids=str)
@pytest.mark.parametrize("size", [None, (12, 8)])
def test_a_patch_that_was_not_declared_is_read_from_them(per, size):
    patch = Patch(5, 2, (8, 6))
    declared = make_maps(SITES, regions={"here": patch}).specific_reference("here", per)
    maps = make_maps(SITES, pairs=True)
    for each in (maps, maps.select(samples=[1, 0]).select(samples=[1, 0])):
        found = each.specific_reference(patch, per, size=size)
        same(found, resize(declared, size or (6, 4)))


def test_it_has_the_size_of_a_declared_one_where_reference_cells_are_coarser():
    patch = Patch(5, 2, (8, 6))
    maps = make_maps(SITES, pairs=((8, 6), (3, 2)))
    assert maps.specific_reference(patch).shape == (2, 6, 4)


def test_a_declared_patch_is_read_where_it_was_declared():
    patch = Patch(5, 2, (8, 6))
    maps = make_maps(SITES, pairs=True, regions=[patch])
    assert maps.specific_reference(patch, ("time", "layer")).shape == (2, 2, 3, 6, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Patch(0, 0, (4, 3)),), r"or be a Patch of the pair grid 8x6; declared: none; got 0,0@4"),
        (("hem",), "region must be declared before the run .* or be a Patch"),
        ((Patch(0, 0, (8, 6)), "layer"), "cannot be read with per=layer; declare it before"),
        ((Patch(0, 0, (8, 6)), ("time", "head")), "cannot be read with per=head, time;"),
    ],
)
def test_patches_that_pair_maps_do_not_know(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_maps(SITES, pairs=True).specific_reference(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "official"}, "cannot be read with preset 'official'"),
        ({"layer_weighting": "area"}, "cannot be read with layer_weighting='area'"),
        ({"per": "head"}, "cannot be read with per=head of layers with different numbers"),
    ],
)
def test_readings_of_a_patch_that_need_layers_or_heads_apart(options, message):
    maps = make_maps([COARSE, MANY], pairs=True)
    with pytest.raises(ValueError, match=message):
        maps.specific_reference(Patch(0, 0, (4, 3)), **options)


# --- subsets, batches, files ----------------------------------------------------------------------


def of(accumulator, **provenance):
    return AttributionMaps(
        accumulator.layers(),
        votes=accumulator.votes,
        rows=accumulator.rows,
        provenance=provenance,
        pairs=accumulator.pairs(),
    )


def test_selecting_and_moving():
    maps = make_maps(SITES, pairs=True, samples=3)
    chosen = maps.select(samples=[2, 0])
    assert torch.equal(chosen.pairs.g2r, maps.pairs.g2r[[2, 0]])
    assert torch.equal(chosen.pairs.r2g, maps.pairs.r2g[[2, 0]])
    assert maps.select(layers="up*").pairs is None
    assert maps.to("meta").pairs.r2g.device.type == "meta"


def test_merging():
    parts = [make_maps(SITES, pairs=True, seed=seed) for seed in range(2)]
    merged = AttributionMaps.merge(parts)
    assert torch.equal(merged.pairs.g2r, torch.cat([part.pairs.g2r for part in parts]))
    assert torch.equal(merged.pairs.r2g, torch.cat([part.pairs.r2g for part in parts]))
    assert AttributionMaps.merge([make_maps(SITES)] * 2).pairs is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "agree in pair maps: result 0 has 8x6 generated by 6x4 .*, result 1 has none"),
        ({"pairs": (4, 3)}, "agree in pair maps: .* result 1 has 4x3 generated by 6x4"),
    ],
)
def test_results_that_do_not_merge(options, message):
    with pytest.raises(ValueError, match=message):
        AttributionMaps.merge([make_maps(SITES, pairs=True), make_maps(SITES, **options)])


def test_pair_maps_of_another_run_are_refused():
    maps = make_maps(SITES)
    with pytest.raises(ValueError, match="pairs must hold 2 samples and 2 time groups, got 3 and"):
        AttributionMaps(
            maps.layer_sums,
            votes=maps.votes,
            rows=maps.rows,
            provenance={},
            pairs=make_pairs(samples=3),
        )


def test_files(tmp_path):
    maps = make_maps([*SITES, SINGLE], pairs=True)
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    maps.save(first)
    loaded = load_maps(first)
    loaded.save(second)
    assert first.read_bytes() == second.read_bytes()
    assert repr(loaded) == repr(maps)
    assert repr(loaded.pairs) == repr(maps.pairs)
    assert loaded.pairs.layers == maps.pairs.layers
    assert torch.equal(loaded.pairs.g2r, maps.pairs.g2r)
    assert torch.equal(loaded.pairs.r2g, maps.pairs.r2g)


def test_a_file_says_whether_it_holds_pair_maps(tmp_path):
    for pairs in (False, True):
        path = tmp_path / f"{pairs}.safetensors"
        make_maps(SITES, pairs=pairs).save(path)
        with safe_open(path, "pt") as file:
            document = json.loads(file.metadata()["i2am"])
            assert document["schema"] == 3
            assert ("pairs" in document) is pairs
            assert any(name.startswith("pairs.") for name in file.keys()) is pairs


def test_what_repr_says():
    maps = make_maps([*SITES, SINGLE], pairs=True)
    line = "pairs: 8x6 generated by 6x4 reference cells, 2 time groups, 2 heads, mean of 3 layers"
    assert line in repr(maps)
    held = sum(
        sums.nbytes
        for layer in maps.layer_sums
        for sums in tensors(layer).values()
        if sums is not None
    )
    assert f"{(held + maps.pairs.nbytes) / 2**20:.1f} MiB" in repr(maps)
    assert repr(maps.pairs).startswith("PairMaps: 8x6 generated by 6x4 reference cells, 2 time")
    assert "no heads" in repr(make_maps([COARSE, MANY], pairs=True).pairs)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named(value):
    maps = make_maps(
        [make_site("up.0", (4, 3), (5, 5))], samples=2, mask=torch.ones(4, 3), pairs=True
    )
    assert maps.nonfinite() == maps.pairs.nonfinite() == []
    maps.pairs.r2g[1, 0, 2, 1] = value
    assert maps.nonfinite() == ["reference_to_generated of the pair maps"]
    assert maps.select(samples=[0]).nonfinite() == []
    maps.pairs.g2r[0, 0, 0, 0] = value
    maps.layer_sums[0].reference_to_generated[0, 0, 0, 0, 0, 0] = value
    assert [line.split(" (")[0] for line in maps.nonfinite()] == [
        "reference_to_generated of up.0",
        "generated_to_reference of the pair maps",
        "reference_to_generated of the pair maps",
    ]


def test_pair_maps_are_of_one_reference(record):
    with pytest.raises(
        ValueError, match=r"pairs must be left out .* got reference 1 and reference 2"
    ):
        record("two references", pairs=True)
    # words have no place
    assert record("reference and words", pairs=True).pairs.reference_grid == (5, 4)
