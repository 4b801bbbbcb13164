"""Sums that are resized and added up while recording: the same maps, without the layer axis."""

import pytest
import torch

from i2am.attribution import Accumulator, AttributionMaps, Direction, Patch
from i2am.attribution.layers import tensors
from i2am.testing import make_qkv, make_site

REFERENCE = (3, 2)
COARSE = make_site("down.attn2", (2, 2), REFERENCE, heads=2)
FINE = make_site("up.attn2", (4, 3), REFERENCE, heads=2)
OTHER_REFERENCE = make_site("other.attn2", (4, 3), (6, 4), heads=2)
MID = make_site("mid_block.attn2", (2, 2), REFERENCE, heads=2)
GRIDLESS = make_site("single.attn2", (4, 3), None, heads=2)
MORE_HEADS = make_site("many.attn2", (4, 3), REFERENCE, heads=4)
OPTIONS = {
    "time_groups": 2,
    "regions": {"patch": Patch(1, 1, (4, 3))},
    "mask": torch.eye(8, 6),
    "reference_mask": torch.eye(6, 4),
}


def call(site, seed, batch=2):
    height, width = site.generated_grid
    query, key, _ = make_qkv(batch, site.heads, height * width, site.reference_tokens, 8, seed=seed)
    return query, key


def record(sites, *, evaluations=4, batch=2, **options):
    accumulator = Accumulator(**{**OPTIONS, **options})
    for evaluation in range(evaluations):
        for number, site in enumerate(sites):
            group = evaluation * accumulator.time_groups // evaluations
            query, key = call(site, 10 * evaluation + number, batch)
            accumulator.add(site, query, key, group=group)
    return accumulator


def maps_of(accumulator):
    return AttributionMaps(
        accumulator.layers(), votes=accumulator.votes, rows=accumulator.rows, provenance={}
    )


def both(sites, **options):
    return [maps_of(record(sites, sums=sums, **options)) for sums in ("native", "resized")]


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize(
    "sites",
    [[COARSE, FINE], [FINE, COARSE, MID], [FINE], [COARSE, OTHER_REFERENCE, FINE]],
    ids=lambda sites: "+".join(site.layer for site in sites),
)
@pytest.mark.parametrize("evaluations", [2, 4])
def test_every_map_that_keeps_no_layers_is_the_same(sites, evaluations):
    native, resized = both(sites, evaluations=evaluations)
    for per in ((), "time", "head", ("time", "head")):
        for votes in native.votes:
            same(
                resized.reference_to_generated(per, votes=votes),
                native.reference_to_generated(per, votes=votes),
            )
        for weights in ("uniform", "mask"):
            same(
                resized.generated_to_reference(per, weights=weights),
                native.generated_to_reference(per, weights=weights),
            )
        same(resized.specific_reference("patch", per), native.specific_reference("patch", per))
    assert resized.layers == ("resized",)
    assert resized.layer_sums[0].site.merged == tuple(site.layer for site in sites)


def test_one_evaluation_is_enough():
    native, resized = both([COARSE, FINE], evaluations=1, time_groups=1)
    same(resized.reference_to_generated(), native.reference_to_generated())


@pytest.mark.parametrize("direction", Direction)
def test_one_direction_alone(direction):
    native, resized = both([COARSE, FINE], directions=[direction])
    assert resized.directions == native.directions == (direction,)
    same(getattr(resized, direction.value)(), getattr(native, direction.value)())


def test_what_stays_does_not_grow_with_the_layers():
    def kept(count):
        sites = [
            make_site(f"{number}.attn2", (4, 3), REFERENCE, heads=2) for number in range(count)
        ]
        accumulator = record(sites, sums="resized")
        held = [sums for each in accumulator._resized.values() for sums in each.tensors]
        for layer in accumulator._layers.values():
            held += [buffer.sums for buffer in layer.held.values()]
        return sum({sums.data_ptr(): sums.nbytes for sums in held}.values())

    assert kept(3) == kept(9)


def test_equal_runs_give_equal_bits():
    first, second = (record([COARSE, FINE], sums="resized").layers()[0] for _ in range(2))
    for name, sums in tensors(first).items():
        assert torch.equal(sums, getattr(second, name))


def test_an_unresolved_recording_resolves_to_the_same():
    options = {**OPTIONS, "mask": torch.rand(2, 8, 6), "sums": "resized"}
    unresolved = Accumulator(**options, unresolved=True)
    direct = Accumulator(**options)
    resolved = None
    for evaluation in range(3):
        for number, site in enumerate([COARSE, FINE]):
            query, key = call(site, 10 * evaluation + number, batch=4)
            direct.add(site, query[2:], key[2:], group=evaluation // 2)
            if resolved is None:
                unresolved.add(site, query, key, group=evaluation // 2)
            else:
                resolved.add(site, query[2:], key[2:], group=evaluation // 2)
        resolved = resolved or unresolved.resolve(slice(2, 4))
    (expected,), (actual,) = direct.layers(), resolved.layers()
    for name, sums in tensors(expected).items():
        same(getattr(actual, name), sums)


def test_without_a_reference_grid_there_is_r2g_only():
    native, resized = both([FINE, GRIDLESS])
    same(resized.reference_to_generated(), native.reference_to_generated())
    with pytest.raises(ValueError, match="does not exist for layers without a reference grid"):
        resized.generated_to_reference()


def test_files_and_merging_keep_which_layers_were_added_up(tmp_path):
    maps = maps_of(record([COARSE, FINE], sums="resized"))
    maps.save(tmp_path / "maps.safetensors")
    loaded = AttributionMaps.load(tmp_path / "maps.safetensors")
    assert loaded.layer_sums[0].site == maps.layer_sums[0].site
    assert torch.equal(loaded.reference_to_generated(), maps.reference_to_generated())
    merged = AttributionMaps.merge([maps, loaded])
    assert merged.n_samples == 4
    assert "mean of 2 layers" in repr(merged)
    with pytest.raises(ValueError, match="agree in layers"):
        AttributionMaps.merge([maps, maps_of(record([COARSE, FINE]))])


@pytest.mark.parametrize(
    ("sites", "reading", "what"),
    [
        ([COARSE, FINE], {"per": "layer"}, "per='layer'"),
        ([COARSE, FINE], {"layer_weighting": "area"}, "layer_weighting='area'"),
        ([COARSE, FINE], {"preset": "official"}, "preset 'official'"),
    ],
)
def test_readings_that_need_layers_apart_are_refused(sites, reading, what):
    maps = maps_of(record(sites, sums="resized"))
    for read in (maps.reference_to_generated, maps.generated_to_reference):
        with pytest.raises(ValueError, match=f"{what} needs the layers apart"):
            read(**reading)


def test_a_preset_without_the_mid_block_is_refused_where_it_was_added():
    from dataclasses import replace

    from i2am.attribution import PAPER

    preset = replace(PAPER, name="mine", without=("mid",))
    maps_of(record([COARSE, FINE], sums="resized")).reference_to_generated(preset=preset)
    with pytest.raises(ValueError, match="preset 'mine' needs the layers apart"):
        maps_of(record([MID, FINE], sums="resized")).reference_to_generated(preset=preset)


def test_layers_with_different_numbers_of_heads_are_averaged_over_them_first():
    native, resized = both([FINE, MORE_HEADS])
    for per in ((), "time"):
        same(resized.reference_to_generated(per), native.reference_to_generated(per))
        same(resized.generated_to_reference(per), native.generated_to_reference(per))
    assert resized.layer_sums[0].site.heads == 1


def test_refuses_a_late_layer_with_another_number_of_heads():
    accumulator = record([FINE, COARSE], sums="resized")
    query, key, _ = make_qkv(2, 4, 12, MORE_HEADS.reference_tokens, 8)
    with pytest.raises(ValueError, match=r"layers of 2 heads, .* which came later, has 4"):
        accumulator.add(MORE_HEADS, query, key, group=0)


def test_refuses_a_late_layer_without_a_reference_grid():
    accumulator = record([FINE], sums="resized")
    query, key = call(GRIDLESS, 0)
    with pytest.raises(ValueError, match=r"single\.attn2, which came later, has none"):
        accumulator.add(GRIDLESS, query, key, group=1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sums": "small"}, "sums must be one of native, resized, got 'small'"),
        ({"sums": "resized", "keep_keys": True}, "keep_keys needs sums='native'"),
    ],
)
def test_refuses_options(options, match):
    with pytest.raises(ValueError, match=match):
        Accumulator(**options)
