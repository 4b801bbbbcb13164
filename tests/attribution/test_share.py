"""The attention share: what part of a patch's attention goes to the reference, counted per call."""

import pytest
import torch

from i2am.attribution import AttributionMaps, mask_weights
from i2am.attribution.accumulator import Accumulator
from i2am.attribution.weights import groups
from i2am.testing import make_maps, make_qkv, make_site

SITE = make_site("down", (4, 3), (3, 2))
FINE = make_site("up", (8, 6), (3, 2))
PREFIX = 2
MASK = torch.tensor([[0, 1], [1, 1], [0, 0.5]])


def calls(site, *, batch=2, steps=4, extra=PREFIX, logits=None):
    height, width = site.generated_grid
    keys = extra + site.reference_tokens
    for seed in range(steps):
        yield make_qkv(batch, site.heads, height * width, keys, 8, seed=seed, logits=logits)[:2]


def recorded(sites, *, time_groups=2, skip=(), logits=None, **recording):
    accumulator = Accumulator(time_groups=time_groups, **recording)
    made = {site.layer: [*calls(site, logits=logits)] for site in sites}
    for step in range(4):
        for site in sites:
            query, key = made[site.layer][step]
            if (site.layer, step) not in skip:
                group = step * time_groups // 4
                accumulator.add(site, query, key, group=group, reference=slice(PREFIX, None))
    return AttributionMaps(
        accumulator.layers(), votes=accumulator.votes, rows=accumulator.rows, provenance={}
    )


def exact(site, weights, *, steps=range(4), logits=None):
    """``P v`` of each call in fp64, ``[steps, batch, heads, h, w]``."""
    shares = []
    for step, (query, key) in enumerate(calls(site, logits=logits)):
        if step in steps:
            p = (8**-0.5 * query.double() @ key.double().mT).softmax(-1)
            shares.append((p * weights).sum(-1).unflatten(-1, site.generated_grid))
    return torch.stack(shares)


EVERY = torch.cat([torch.zeros(PREFIX), torch.ones(6)]).double()
INSIDE = torch.cat([torch.zeros(PREFIX), mask_weights(MASK[None], (3, 2))[0]]).double()


@pytest.mark.parametrize("logits", [None, 200.0])
@pytest.mark.parametrize(("votes", "weights"), [("uniform", EVERY), ("mask", INSIDE)])
def test_it_is_the_mean_over_steps_and_heads_of_the_softmax_over_keys(votes, weights, logits):
    maps = recorded([SITE], reference_mask=MASK, logits=logits)
    shares = exact(SITE, weights, logits=logits)
    read = maps.reference_to_generated
    options = {"measure": "share", "votes": votes}
    wanted = {
        (): shares.mean((0, 2)),
        ("head",): shares.mean(0),
        ("time",): torch.stack([shares[:2].mean((0, 2)), shares[2:].mean((0, 2))], dim=1),
    }
    for per, expected in wanted.items():
        torch.testing.assert_close(read(per=per, **options).double(), expected, rtol=0, atol=1e-6)


def test_groups_that_cover_all_keys_add_up_to_1():
    reference = groups(8, slice(2, None), grid=(3, 2), mask=MASK[None], samples=1)
    beside = 1 - reference[:, :1]
    assert torch.equal(reference[:, :1] + beside, torch.ones(1, 1, 8))
    maps = make_maps([SITE], reference_mask=torch.ones(3, 2))
    # a mask over everything, and nothing beside the reference
    for votes in ("uniform", "mask"):
        share = maps.reference_to_generated(measure="share", votes=votes)
        torch.testing.assert_close(share, torch.ones_like(share), rtol=0, atol=1e-6)


def test_a_layer_that_a_cache_skips_weighs_as_much_as_the_others():
    skipped = {("down", 1), ("down", 2)}
    maps = recorded([SITE, FINE], reference_mask=MASK, skip=skipped)
    assert maps.layer_sums[0].calls.tolist() == [[1, 1], [1, 1]]
    assert maps.layer_sums[1].calls.tolist() == [[2, 2], [2, 2]]
    down = exact(SITE, INSIDE, steps=(0, 3)).mean((0, 2))
    up = exact(FINE, INSIDE).mean((0, 2))
    layers = maps.reference_to_generated("layer", measure="share", votes="mask", size=(4, 3))
    torch.testing.assert_close(layers[:, 0].double(), down, rtol=0, atol=1e-6)
    own = maps.select(layers="up").reference_to_generated(measure="share", votes="mask")
    torch.testing.assert_close(own.double(), up, rtol=0, atol=1e-6)
    # sums of the other maps count as if it had been called as often
    full = recorded([SITE, FINE])
    for read in ("reference_to_generated", "generated_to_reference"):
        sums = getattr(maps, read)("layer").sum((-1, -2))
        reached = getattr(full, read)("layer").sum((-1, -2))
        torch.testing.assert_close(sums, reached, rtol=2e-2, atol=0)
    uniform = maps.layer_sums[1].reference_to_generated[:, :, :, :1]
    torch.testing.assert_close(uniform, full.layer_sums[1].reference_to_generated)


def test_every_sample_has_its_own_mask_also_before_samples_are_known():
    masks = torch.stack([MASK, 1 - MASK])
    known = recorded([SITE], reference_mask=masks)
    pending = Accumulator(time_groups=1, reference_mask=masks, unresolved=True)
    query, key = next(calls(SITE, batch=4))
    pending.add(SITE, query, key, group=0, reference=slice(PREFIX, None))
    (layer,) = pending.resolve(slice(2, 4)).layers()
    p = (8**-0.5 * query[2:].double() @ key[2:].double().mT).softmax(-1)[..., PREFIX:]
    inside = mask_weights(masks, (3, 2)).double()
    wanted = torch.einsum("bhqk,bk->bhq", p, inside)
    got = layer.attention_share[:, 0, :, 1].flatten(-2).double()
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    assert layer.calls.tolist() == [[1], [1]]
    together = known.reference_to_generated(measure="share", votes="mask")
    alone = recorded([SITE], reference_mask=MASK).reference_to_generated(
        measure="share", votes="mask"
    )
    assert torch.equal(together[0], alone[0])


def test_resized_sums_keep_the_mean():
    apart = recorded([SITE, FINE], reference_mask=MASK)
    resized = recorded([SITE, FINE], reference_mask=MASK, sums="resized")
    for per in ((), ("time",), ("head",)):
        options = {"per": per, "measure": "share", "votes": "mask", "size": (8, 6)}
        torch.testing.assert_close(
            resized.reference_to_generated(**options),
            apart.reference_to_generated(**options),
            rtol=0,
            atol=1e-6,
        )


def test_which_share_says_most():
    assert recorded([SITE], reference_mask=MASK).share_of == "mask"
    assert recorded([SITE]).share_of == "uniform"
    # the reference is all there is: its share is 1 everywhere
    assert make_maps([SITE]).share_of is None
    assert make_maps([SITE], directions=["generated_to_reference"]).share_of is None


def test_an_unknown_measure():
    with pytest.raises(ValueError, match="measure must be 'share' or 'spread', got 'mass'"):
        make_maps([SITE]).reference_to_generated(measure="mass")
