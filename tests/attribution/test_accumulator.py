"""Sums per layer: what is added where, and what an unresolved recording resolves to."""

import pytest
import torch

from i2am.attribution import Box, Direction, Patch, mask_weights, region_weights
from i2am.attribution.accumulator import Accumulator, AttentionSite
from i2am.testing import make_qkv, make_site

R2G, G2R = Direction
GENERATED, REFERENCE = (4, 3), (3, 2)
QUERIES, TOKENS, HEADS, PREFIX = 12, 6, 2, 1
SITE = make_site("down.attn2", GENERATED, REFERENCE, heads=HEADS)
OTHER = make_site("up.attn2", (2, 2), REFERENCE, heads=HEADS)
BEHIND_PREFIX = slice(PREFIX, None)


def call(batch, *, site=SITE, extra=PREFIX, seed=0, dtype=torch.float32):
    """Query and key of one attention call of `site`, with `extra` keys before the reference's."""
    height, width = site.generated_grid
    keys = extra + site.reference_tokens
    query, key, _ = make_qkv(batch, site.heads, height * width, keys, 8, seed=seed, dtype=dtype)
    return query, key


def both_softmaxes(query, key, *, scale=8**-0.5, bias=0.0):
    """`P` and `C`, `[batch, heads, queries, keys]` in fp64."""
    scores = scale * query.double() @ key.double().mT + bias
    return scores.softmax(-1), scores.softmax(-2)


def masks(count, height=8, width=6):
    """Random masks in [0, 1], each with a hole."""
    values = torch.rand(count, height, width, generator=torch.Generator().manual_seed(count))
    values[:, :2] = 0
    return values


def close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def record(accumulator, calls, *, site=SITE, **options):
    for number, (query, key) in enumerate(calls):
        group = number % accumulator.time_groups
        accumulator.add(site, query, key, group=group, reference=BEHIND_PREFIX, **options)
    return accumulator


# --- what is added --------------------------------------------------------------------------------


def test_sums_are_the_means_of_both_softmaxes_over_the_reference_tokens():
    query, key = call(2)
    (layer,) = record(Accumulator(time_groups=1), [(query, key)]).layers()
    p, c = both_softmaxes(query, key)
    assert layer.site == SITE
    assert layer.reference_to_generated.shape == (2, 1, HEADS, 1, *GENERATED)
    assert layer.generated_to_reference.shape == (2, 1, HEADS, 1, *REFERENCE)
    assert layer.reference_to_generated.dtype == torch.float32
    assert layer.reference_to_generated_by_key is None
    close(layer.reference_to_generated[:, 0, :, 0].flatten(-2), c[..., PREFIX:].mean(-1))
    # P is normalized over the prefix too: its share is missing from the map
    close(layer.generated_to_reference[:, 0, :, 0].flatten(-2), p[..., PREFIX:].mean(-2))
    assert (layer.generated_to_reference.sum((-1, -2)) < 1).all()


def test_time_groups_are_separate_and_calls_of_one_group_add_up():
    calls = [call(2, seed=seed) for seed in range(5)]
    (layer,) = record(Accumulator(time_groups=3), calls).layers()
    for group, seeds in enumerate([(0, 3), (1, 4), (2,)]):
        alone = Accumulator(time_groups=1)
        (expected,) = record(alone, [calls[seed] for seed in seeds]).layers()
        close(layer.reference_to_generated[:, group], expected.reference_to_generated[:, 0])
        close(layer.generated_to_reference[:, group], expected.generated_to_reference[:, 0])


def test_a_group_that_saw_no_call_is_0():
    accumulator = Accumulator(time_groups=4)
    accumulator.add(SITE, *call(1, extra=0), group=2)
    (layer,) = accumulator.layers()
    assert layer.reference_to_generated[:, 2].all()
    assert not layer.reference_to_generated[:, [0, 1, 3]].any()
    assert not layer.generated_to_reference[:, [0, 1, 3]].any()


def test_layers_come_in_the_order_in_which_they_were_first_seen():
    accumulator = Accumulator(time_groups=1)
    assert len(accumulator) == 0
    assert accumulator.samples is None
    for site in (OTHER, SITE, OTHER):
        accumulator.add(site, *call(3, site=site, extra=0), group=0)
    assert [layer.site for layer in accumulator.layers()] == [OTHER, SITE]
    assert len(accumulator) == 2
    assert accumulator.samples == 3


def test_scale_and_bias_of_the_call_are_used():
    query, key = call(2)
    bias = torch.randn(QUERIES, PREFIX + TOKENS, generator=torch.Generator().manual_seed(0))
    accumulator = record(Accumulator(time_groups=1), [(query, key)], scale=0.7, bias=bias)
    (layer,) = accumulator.layers()
    p, c = both_softmaxes(query, key, scale=0.7, bias=bias)
    close(layer.reference_to_generated[:, 0, :, 0].flatten(-2), c[..., PREFIX:].mean(-1))
    close(layer.generated_to_reference[:, 0, :, 0].flatten(-2), p[..., PREFIX:].mean(-2))


def test_a_known_row_log_sum_exp_changes_nothing():
    query, key = call(2)
    lse = (query @ key.mT * 8**-0.5).logsumexp(-1)
    (layer,) = record(Accumulator(time_groups=1), [(query, key)], query_lse=lse).layers()
    (expected,) = record(Accumulator(time_groups=1), [(query, key)]).layers()
    close(layer.reference_to_generated, expected.reference_to_generated)
    close(layer.generated_to_reference, expected.generated_to_reference)


def test_impl_is_handed_on(monkeypatch):
    from i2am.kernels import reference, streaming

    seen = []
    for module in (reference, streaming):

        def spy(*args, original=module.accumulate, module=module, **kwargs):
            seen.append(module)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, "accumulate", spy)
    for impl in ("reference", "streaming", None):
        record(Accumulator(time_groups=1, impl=impl), [call(1)])
    # first the row log-sum-exp of all keys, then the sums over the reference
    assert seen == [reference] * 2 + [streaming] * 4


# --- which tokens ---------------------------------------------------------------------------------


def test_reference_tokens_may_be_any_keys_in_any_order():
    # a box of a larger grid of keys, as where a canvas holds both images side by side
    query, key = call(2, extra=14)
    index = (torch.arange(3)[:, None] * 5 + torch.arange(1, 3)).flatten()
    assert index.tolist() == [1, 2, 6, 7, 11, 12]
    accumulator = Accumulator(time_groups=1, keep_keys=True)
    accumulator.add(SITE, query, key, group=0, reference=index)
    (layer,) = accumulator.layers()
    p, c = both_softmaxes(query, key)
    close(layer.reference_to_generated[:, 0, :, 0].flatten(-2), c[..., index].mean(-1))
    close(layer.generated_to_reference[:, 0, :, 0].flatten(-2), p[..., index].mean(-2))
    close(layer.reference_to_generated_by_key[:, 0].flatten(-2), c[..., index].mT)


def test_prefix_tokens_vote_where_asked_to():
    query, key = call(2)
    accumulator = Accumulator(time_groups=1, keep_keys=True)
    (layer,) = record(accumulator, [(query, key)], voters=slice(None)).layers()
    p, c = both_softmaxes(query, key)
    close(layer.reference_to_generated[:, 0, :, 0].flatten(-2), c.mean(-1))
    close(layer.generated_to_reference[:, 0, :, 0].flatten(-2), p[..., PREFIX:].mean(-2))
    assert layer.reference_to_generated_by_key.shape[3] == PREFIX + TOKENS
    close(layer.reference_to_generated_by_key[:, 0].flatten(-2), c.mT)


def test_a_single_reference_token_has_no_place_to_draw_on():
    site = make_site("mid.attn2", GENERATED, None, heads=HEADS)
    query, key = call(2, site=site, extra=0)
    accumulator = Accumulator(time_groups=1, reference_mask=masks(2))
    accumulator.add(site, query, key, group=0)
    (layer,) = accumulator.layers()
    assert layer.generated_to_reference is None
    _, c = both_softmaxes(query, key)
    # its mask votes hold their place only, and reading them is refused
    for vote in (0, 1):
        close(layer.reference_to_generated[:, 0, :, vote].flatten(-2), c[..., 0])


# --- rows and votes -------------------------------------------------------------------------------


def test_rows_are_the_uniform_one_the_mask_and_the_regions():
    query, key = call(2)
    inside = masks(2)
    blob = torch.zeros(16, 12)
    blob[3:9, 5:] = torch.rand(6, 7, generator=torch.Generator().manual_seed(0))
    regions = {"hem": blob, "0,1@2x2": Patch(0, 1, (2, 2))}
    accumulator = record(Accumulator(time_groups=1, regions=regions, mask=inside), [(query, key)])
    assert accumulator.rows == ("uniform", "mask", "hem", "0,1@2x2")
    assert accumulator.votes == ("uniform",)
    (layer,) = accumulator.layers()
    p, _ = both_softmaxes(query, key)
    x = mask_weights(inside, GENERATED)
    weights = torch.stack(
        [
            torch.full((2, QUERIES), 1 / QUERIES),
            x / QUERIES,
            region_weights(blob, GENERATED).expand(2, -1),
            region_weights(Patch(0, 1, (2, 2)), GENERATED).expand(2, -1),
        ],
        dim=1,
    )
    expected = (weights[:, None].double() @ p)[..., PREFIX:]
    close(layer.generated_to_reference[:, 0].flatten(-2), expected)


def test_regions_may_come_without_names():
    query, key = call(2)
    patch, box = Patch(0, 1, (2, 2)), Box(1, 0, 2, 3, (8, 6))
    accumulator = record(Accumulator(time_groups=1, regions=[patch, box]), [(query, key)])
    assert accumulator.rows == ("uniform", "0,1@2x2", "1,0,2,3@8x6")
    (layer,) = accumulator.layers()
    p, _ = both_softmaxes(query, key)
    for row, region in ((1, patch), (2, box)):
        weights = region_weights(region, GENERATED).double()
        close(
            layer.generated_to_reference[:, 0, :, row].flatten(-2),
            (weights @ p)[..., -TOKENS:],
        )


def test_votes_are_the_uniform_one_and_the_reference_mask():
    query, key = call(2)
    inside = masks(2)
    accumulator = record(Accumulator(time_groups=1, reference_mask=inside), [(query, key)])
    assert accumulator.votes == ("uniform", "mask")
    assert accumulator.rows == ("uniform",)
    (layer,) = accumulator.layers()
    _, c = both_softmaxes(query, key)
    garment = mask_weights(inside, REFERENCE).double()
    garment = garment / garment.sum(-1, keepdim=True)
    expected = (c[..., PREFIX:] * garment[:, None, None]).sum(-1)
    close(layer.reference_to_generated[:, 0, :, 0].flatten(-2), c[..., PREFIX:].mean(-1))
    close(layer.reference_to_generated[:, 0, :, 1].flatten(-2), expected)
    # one unit per vote vector
    assert layer.reference_to_generated.sum((-1, -2)).allclose(torch.ones(()))


def test_images_per_prompt_share_the_mask_of_their_prompt_one_after_the_other():
    query, key = call(6)
    generated, reference = masks(2), masks(3)
    accumulator = Accumulator(time_groups=1, mask=generated, reference_mask=reference)
    (layer,) = record(accumulator, [(query, key)]).layers()
    for sample in range(6):
        alone = Accumulator(
            time_groups=1, mask=generated[sample // 3], reference_mask=reference[sample // 2]
        )
        rows = slice(sample, sample + 1)
        (expected,) = record(alone, [(query[rows], key[rows])]).layers()
        close(layer.reference_to_generated[rows], expected.reference_to_generated)
        close(layer.generated_to_reference[rows], expected.generated_to_reference)


def test_a_mask_without_a_batch_is_everybodys():
    calls = [call(3)]
    (one,) = record(Accumulator(mask=masks(1)[0], time_groups=1), calls).layers()
    (each,) = record(Accumulator(mask=masks(1).expand(3, -1, -1), time_groups=1), calls).layers()
    assert torch.equal(one.generated_to_reference, each.generated_to_reference)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16], ids=str)
def test_masks_may_have_any_dtype(dtype):
    inside = masks(2).round()
    options = {"time_groups": 1, "keep_keys": False}
    given = Accumulator(mask=inside.to(dtype), reference_mask=inside.to(dtype), **options)
    expected = Accumulator(mask=inside, reference_mask=inside, **options)
    for ours, theirs in zip(
        record(given, [call(2)]).layers(), record(expected, [call(2)]).layers(), strict=True
    ):
        assert torch.equal(ours.reference_to_generated, theirs.reference_to_generated)
        assert torch.equal(ours.generated_to_reference, theirs.generated_to_reference)


# --- directions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("as_text", [False, True], ids=["member", "text"])
def test_only_the_asked_direction_is_recorded(direction, as_text):
    query, key = call(2)
    asked = str(direction.value) if as_text else direction
    (both,) = record(Accumulator(time_groups=1), [(query, key)]).layers()
    accumulator = Accumulator(time_groups=1, directions=[asked], keep_keys=True)
    (layer,) = record(accumulator, [(query, key)]).layers()
    assert accumulator.directions == (direction,)
    assert accumulator.samples == 2
    for name in Direction:
        sums = getattr(layer, name.value)
        if name is direction:
            assert torch.equal(sums, getattr(both, name.value))
        else:
            assert sums is None
    assert (layer.reference_to_generated_by_key is None) == (direction is G2R)


# --- keys kept apart ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mask", [None, "additive", "bool"])
def test_keys_kept_apart_are_the_softmax_over_queries_of_each(dtype, mask):
    query, key = call(2, dtype=dtype)
    numbers = torch.randn(QUERIES, PREFIX + TOKENS, generator=torch.Generator().manual_seed(0))
    bias = {None: None, "additive": numbers, "bool": numbers > -1}[mask]
    shift = numbers if mask == "additive" else torch.zeros(())
    if mask == "bool":
        bias = bias.clone()
        bias[:, 3] = False  # a key that nobody may attend to
        shift = torch.where(bias, 0.0, -torch.inf)
    accumulator = Accumulator(time_groups=2, keep_keys=True)
    (layer,) = record(accumulator, [(query, key)] * 3, bias=bias).layers()
    assert layer.reference_to_generated_by_key.shape == (2, 2, HEADS, TOKENS, *GENERATED)
    _, c = both_softmaxes(query, key, bias=shift.double())
    expected = c[..., PREFIX:].mT.nan_to_num(0)
    for group, calls in enumerate((2, 1)):
        by_key = layer.reference_to_generated_by_key[:, group].flatten(-2)
        close(by_key, calls * expected)
        assert not by_key.isnan().any()
        if mask == "bool":
            assert not by_key[:, :, 3 - PREFIX].any()
        # the uniform vote is their mean
        close(layer.reference_to_generated[:, group, :, 0].flatten(-2), by_key.mean(-2))


def test_keys_kept_apart_use_the_scale_of_the_call():
    query, key = call(1)
    accumulator = Accumulator(time_groups=1, keep_keys=True)
    (layer,) = record(accumulator, [(query, key)], scale=0.9).layers()
    _, c = both_softmaxes(query, key, scale=0.9)
    close(layer.reference_to_generated_by_key[:, 0].flatten(-2), c[..., PREFIX:].mT)


# --- unresolved recordings ------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [None, 1, 2], ids=["no masks", "one mask", "two masks"])
@pytest.mark.parametrize("directions", [(R2G, G2R), (R2G,), (G2R,)], ids=["both", "R2G", "G2R"])
@pytest.mark.parametrize("images", [1, 3], ids="images={}".format)
@pytest.mark.parametrize("half", [0, 1], ids=["first half", "second half"])
def test_resolving_equals_recording_the_rows_directly(half, images, directions, masked):
    samples = 2 * images
    rows = slice(half * samples, (half + 1) * samples)
    options = {
        "time_groups": 2,
        "directions": directions,
        "regions": {"top": Patch(0, 0, (2, 1))},
        "keep_keys": True,
        "mask": None if masked is None else masks(masked),
        "reference_mask": None if masked is None else masks(masked, 9, 9),
    }
    whole, direct = Accumulator(**options, unresolved=True), Accumulator(**options)
    for site, seed in ((SITE, 0), (OTHER, 1), (SITE, 2)):
        query, key = call(2 * samples, site=site, seed=seed)
        record(whole, [(query, key)], site=site)
        record(direct, [(query[rows], key[rows])], site=site)
    resolved = whole.resolve(rows)
    # and the recording goes on with what was resolved
    query, key = call(samples, seed=3)
    for accumulator in (resolved, direct):
        record(accumulator, [(query, key)])
    assert not resolved.unresolved
    assert resolved.samples == samples
    assert resolved.rows == direct.rows
    assert resolved.votes == direct.votes
    for actual, expected in zip(resolved.layers(), direct.layers(), strict=True):
        assert actual.site == expected.site
        for name in (*(d.value for d in Direction), "reference_to_generated_by_key"):
            ours, theirs = getattr(actual, name), getattr(expected, name)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                close(ours, theirs)


def test_what_was_resolved_no_longer_follows_the_whole_recording():
    whole = record(Accumulator(time_groups=1, unresolved=True, keep_keys=True), [call(2)])
    (before,) = whole.resolve(slice(0, 1)).layers()
    sums = [before.reference_to_generated.clone(), before.generated_to_reference.clone()]
    record(whole, [call(2)])
    assert torch.equal(before.reference_to_generated, sums[0])
    assert torch.equal(before.generated_to_reference, sums[1])


def test_a_layer_without_any_sums_resolves_too():
    # one token has no place on the reference image, so nothing of it is recorded in this direction
    single = make_site("mid.attn2", GENERATED, None, heads=HEADS)
    whole = Accumulator(time_groups=1, directions=[G2R], unresolved=True, mask=masks(2))
    for site in (single, SITE):
        whole.add(site, *call(4, site=site, extra=0), group=0)
    without, with_sums = whole.resolve(slice(0, 2)).layers()
    assert (without.site, without.generated_to_reference) == (single, None)
    assert with_sums.generated_to_reference.shape[0] == 2


# --- numbers and modes ----------------------------------------------------------------------------


def test_fp64_calls_are_summed_in_fp64():
    query, key = call(2, dtype=torch.float64)
    accumulator = Accumulator(time_groups=1, keep_keys=True, regions={"top": Patch(0, 0, (2, 1))})
    (layer,) = record(accumulator, [(query, key)]).layers()
    p, c = both_softmaxes(query, key)
    by_key = layer.reference_to_generated_by_key
    assert {layer.reference_to_generated.dtype, by_key.dtype} == {torch.float64}
    assert layer.generated_to_reference.dtype == torch.float64
    close(by_key[:, 0].flatten(-2), c[..., PREFIX:].mT, 1e-14)
    # the weights themselves are fp32: a region's cover is no finer than that
    close(layer.generated_to_reference[:, 0, :, 0].flatten(-2), p[..., PREFIX:].mean(-2), 1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_calls_are_summed_in_fp32(dtype):
    query, key = call(2, dtype=dtype)
    (layer,) = record(Accumulator(time_groups=1), [(query, key)] * 50).layers()
    p, c = both_softmaxes(query, key)
    assert layer.reference_to_generated.dtype == torch.float32
    close(layer.reference_to_generated[:, 0, :, 0].flatten(-2), 50 * c[..., PREFIX:].mean(-1), 2e-5)
    close(layer.generated_to_reference[:, 0, :, 0].flatten(-2), 50 * p[..., PREFIX:].mean(-2), 2e-5)


def test_sums_that_began_in_inference_mode_can_be_added_to_and_resolved_outside():
    calls = [call(2, seed=seed) for seed in range(2)]
    accumulator = Accumulator(time_groups=1, mask=masks(2), keep_keys=True, unresolved=True)
    with torch.inference_mode():
        record(accumulator, [tuple(tokens.clone() for tokens in calls[0])])
    record(accumulator, [calls[1]])
    (layer,) = accumulator.resolve(slice(0, 2)).layers()
    expected = Accumulator(time_groups=1, mask=masks(2), keep_keys=True)
    (wanted,) = record(expected, calls).layers()
    for name in (*(d.value for d in Direction), "reference_to_generated_by_key"):
        assert not getattr(layer, name).is_inference()
        close(getattr(layer, name), getattr(wanted, name))


def test_a_model_that_trains_may_be_recorded():
    query, key = call(1)
    accumulator = record(Accumulator(time_groups=1), [(query.requires_grad_(), key)])
    (layer,) = accumulator.layers()
    assert not layer.reference_to_generated.requires_grad


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"time_groups": 0}, "time_groups must be at least 1, got 0"),
        ({"directions": []}, "directions must name at least one direction, got none"),
        ({"directions": ["sideways"]}, "sideways"),
        ({"regions": {"mask": Patch(0, 0, (1, 1))}}, "regions must not be called 'mask'"),
        ({"regions": {"uniform": Patch(0, 0, (1, 1))}}, "regions must not be called 'uniform'"),
        ({"regions": [torch.ones(2, 2)]}, "regions without names must be Patch or Box"),
        ({"mask": torch.ones(1, 1, 4, 4)}, r"mask must be \[height, width\] or .*\[1, 1, 4, 4\]"),
        ({"reference_mask": torch.ones(4)}, r"reference_mask must be \[height.*got \[4\]"),
        ({"mask": torch.zeros(4, 4)}, "mask must cover something, got one that is 0 everywhere"),
        (
            {"reference_mask": torch.stack([torch.ones(4, 4), torch.zeros(4, 4)])},
            "reference_mask must cover something",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_options(options, match):
    with pytest.raises(ValueError, match=match):
        Accumulator(**options)


def changed_site(**changes):
    fields = {
        "layer": "down.attn2",
        "heads": HEADS,
        "generated_grid": GENERATED,
        "reference_grid": REFERENCE,
        "reference_tokens": TOKENS,
        "informative": True,
    }
    return AttentionSite(**(fields | changes))


@pytest.mark.parametrize(
    ("site", "match"),
    [
        (changed_site(heads=3), "down.attn2 must have 3 heads, .*got 2, 12 and 6"),
        (changed_site(generated_grid=(4, 4)), "must have 2 heads, 4x4 generated"),
        (changed_site(reference_tokens=7), "7 reference tokens, got 2, 12 and 6"),
        (
            changed_site(reference_grid=(2, 2)),
            "reference_grid of down.attn2 must hold 6 tokens, got 2x2",
        ),
    ],
    ids=["heads", "generated", "reference", "reference grid"],
)
def test_refuses_a_call_that_does_not_fit_its_site(site, match):
    accumulator = Accumulator(time_groups=1)
    with pytest.raises(ValueError, match=match):
        record(accumulator, [call(2)], site=site)
    assert len(accumulator) == 0


def test_refuses_a_site_that_changes_during_the_run():
    accumulator = record(Accumulator(time_groups=1), [call(2)])
    with pytest.raises(
        ValueError, match=r"down.attn2 changed during the run, from .* to .*informative"
    ):
        record(accumulator, [call(2)], site=changed_site(informative=False))


def test_refuses_a_batch_that_changes_during_the_run():
    accumulator = record(Accumulator(time_groups=1), [call(2)])
    with pytest.raises(ValueError, match="must be"):
        record(accumulator, [call(3)])


@pytest.mark.parametrize("name", ["mask", "reference_mask"])
def test_refuses_masks_that_do_not_divide_the_samples(name):
    accumulator = Accumulator(time_groups=1, **{name: masks(2)})
    with pytest.raises(
        ValueError, match="masks must be one per sample or divide them, got 2 for 3"
    ):
        record(accumulator, [call(3)])
    unresolved = Accumulator(time_groups=1, unresolved=True, **{name: masks(2)})
    record(unresolved, [call(4)])
    with pytest.raises(ValueError, match="got 2 for 3"):
        unresolved.resolve(slice(0, 3))
