"""Shares by the norm of what tokens bring, and G2R given that a patch looks at the reference."""

from dataclasses import replace

import pytest
import torch

from i2am.attribution import AttributionMaps, load_maps, mask_weights
from i2am.attribution.accumulator import Accumulator
from i2am.attribution.buffers import Words
from i2am.testing import make_qkv, make_site

# text of 7 tokens, 12 generated, references of 6 and 8
TEXT, GENERATED, FIRST, SECOND = slice(0, 7), slice(7, 19), slice(19, 25), slice(25, 33)
SITE = replace(make_site("joint", (4, 3), None), measure="share")
ONE = replace(SITE, source="reference 1", reference_grid=(2, 3), reference_tokens=6)
TWO = replace(SITE, source="reference 2", reference_grid=(4, 2), reference_tokens=8)
SAID = replace(SITE, source="red", role="text", reference_tokens=2)
NAMES = ("red", "shirt")
TOKENS = torch.zeros(2, 2, 7)
TOKENS[0, 0, 1] = TOKENS[0, 1, 2:4] = TOKENS[1, 0, 5] = TOKENS[1, 1, 0] = 1
MASK = torch.tensor([[[0, 1, 1], [1, 0, 0.25]], [[1, 1, 0], [0, 0, 1.0]]])
PAINTED = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1.0]])
BOTH = {"values": "norm", "normalise": "conditional"}


def calls(batch=2, *, steps=4, logits=None):
    for step in range(steps):
        query, key, value = make_qkv(batch, 2, 33, 33, 8, seed=step, logits=logits)
        bias = torch.zeros(batch, 1, 1, 33)
        bias[:, ..., 4] = -torch.inf
        bias[-1, ..., FIRST.start] = -torch.inf
        yield query[:, :, GENERATED], key, bias, (5 * value).norm(dim=-1)


def recorded(*, batch=2, layers=("joint",), words=False, norms=None, logits=None, **options):
    accumulator = Accumulator(time_groups=2, **BOTH | options)
    for step, (query, key, bias, norm) in enumerate(calls(batch, logits=logits)):
        for layer in layers:
            add(
                accumulator, step // 2, query, key, bias, norms or (lambda n: n), norm, layer, words
            )
    return accumulator


def add(accumulator, group, query, key, bias, norms, norm, layer="joint", words=False):
    given = {"group": group, "bias": bias}
    if accumulator.values == "norm":
        given["norms"] = norms(norm)
    lse = None
    for site, span in ((ONE, FIRST), (TWO, SECOND)):
        site = replace(site, layer=layer)
        lse = accumulator.add(site, query, key, reference=span, query_lse=lse, **given)
    if words:
        said, given = replace(SAID, layer=layer), given | {"words": Words(NAMES, TOKENS)}
        accumulator.add(said, query, key, reference=TEXT, query_lse=lse, **given)


def read(accumulator):
    return AttributionMaps(
        accumulator.layers(), votes=accumulator.votes, rows=accumulator.rows, provenance={}
    )


def exact(batch=2, *, logits=None):
    """``P`` and what every key counts with, fp64, of each call."""
    for query, key, bias, norm in calls(batch, logits=logits):
        scores = 8**-0.5 * query.double() @ key.double().mT + bias.double()
        yield scores, norm.double()


def by_norm(weights, **options):
    """``[steps, batch, heads, 4, 3]``."""
    sums = [(s.softmax(-1) * n[:, :, None] * weights).sum(-1) for s, n in exact(**options)]
    return torch.stack(sums).unflatten(-1, (4, 3))


def given_that(span, rows, grid, **options):
    """``[steps, batch, heads, h, w]``: ``W P / m`` by definition."""
    sums = []
    for scores, _ in exact(**options):
        p = scores.softmax(-1)[..., span]
        sums.append((rows * p / p.sum(-1, keepdim=True)).sum(-2))
    return torch.stack(sums).unflatten(-1, grid)


def close(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape
    atol = tolerance * expected.max().item()
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=atol)


def ones(span):
    weights = torch.zeros(33, dtype=torch.float64)
    weights[span] = 1
    return weights


@pytest.mark.parametrize("impl", ["reference", "streaming"])
@pytest.mark.parametrize("logits", [None, 100.0])
def test_a_token_counts_by_its_norm(impl, logits):
    maps = read(recorded(impl=impl, reference_mask=MASK, logits=logits))
    read_as = maps.reference_to_generated
    for source, span, grid in (("reference 1", FIRST, (2, 3)), ("reference 2", SECOND, (4, 2))):
        inside = torch.zeros(2, 1, 1, 33, dtype=torch.float64)
        inside[..., span] = mask_weights(MASK, grid).double()[:, None, None]
        for votes, weights in (("uniform", ones(span)), ("mask", inside)):
            sums = by_norm(weights, logits=logits)
            options = {"source": source, "values": "norm", "votes": votes}
            close(read_as(**options), sums.mean(2).mean(0), 2e-5)
            by_time = sums.mean(2).unflatten(0, (2, 2)).mean(1).transpose(0, 1)
            close(read_as("time", **options), by_time, 2e-5)
            close(read_as("head", measure="share", **options), sums.mean(0), 2e-5)
    both = by_norm(ones(slice(FIRST.start, SECOND.stop)), logits=logits)
    close(read_as(values="norm"), both.mean(2).mean(0), 2e-5)


@pytest.mark.parametrize("impl", ["reference", "streaming"])
@pytest.mark.parametrize("logits", [None, 100.0])
def test_conditional_counts_every_patch_alike(impl, logits):
    maps = read(recorded(impl=impl, mask=PAINTED, regions={"corner": PAINTED}, logits=logits))
    rows = {"uniform": torch.full((12, 1), 1 / 12), "mask": PAINTED.flatten()[:, None] / 12}
    for source, span, grid in (("reference 1", FIRST, (2, 3)), ("reference 2", SECOND, (4, 2))):
        for weights, row in rows.items():
            sums = given_that(span, row, grid, logits=logits)
            options = {"source": source, "weights": weights, "normalise": "conditional"}
            found = maps.generated_to_reference(**options)
            close(found, sums.mean(2).sum(0), 2e-5)
            if weights == "uniform":
                torch.testing.assert_close(found.sum((-2, -1)), torch.full((2,), 4.0))
            close(maps.generated_to_reference("head", **options), sums.sum(0), 2e-5)
            full = maps.generated_to_reference(source=source, weights=weights)
            assert not torch.allclose(found, full, rtol=0.2)


@pytest.mark.parametrize("sums", ["native", "resized"])
def test_what_is_recorded_always_stays_what_it_is(sums):
    plain = read(recorded(values="one", normalise="full", sums=sums, mask=PAINTED, words=True))
    asked = read(recorded(sums=sums, mask=PAINTED, words=True))
    for one, other in zip(plain.layer_sums, asked.layer_sums, strict=True):
        assert one.attention_norm is None
        assert one.generated_to_reference_conditional is None
        for name in ("reference_to_generated", "generated_to_reference", "attention_share"):
            if (held := getattr(one, name)) is not None:
                torch.testing.assert_close(getattr(other, name), held, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("source", ["reference 2", "shirt", None])
def test_where_all_norms_are_1_it_is_the_share(source):
    maps = read(recorded(norms=torch.ones_like, words=True))
    share = maps.reference_to_generated(source=source, measure="share")
    by = maps.reference_to_generated(source=source, values="norm")
    torch.testing.assert_close(by, share, rtol=1e-6, atol=0)


def test_a_token_that_brings_nothing_counts_nothing():
    maps = read(recorded(norms=torch.zeros_like))
    assert not maps.reference_to_generated(values="norm").any()


def test_words_count_by_the_norms_of_their_tokens():
    maps = read(recorded(words=True))
    for word, name in enumerate(NAMES):
        weights = torch.zeros(2, 1, 1, 33, dtype=torch.float64)
        weights[..., TEXT] = TOKENS[:, word].double()[:, None, None]
        expected = by_norm(weights).mean(2).mean(0)
        close(maps.reference_to_generated(source=name, values="norm"), expected)


def test_samples_that_are_known_later():
    masks = {"mask": PAINTED[None].repeat(2, 1, 1).flip(0), "reference_mask": MASK}
    known = read(recorded(words=True, **masks))
    accumulator = Accumulator(time_groups=2, unresolved=True, **BOTH, **masks)
    for step, (query, key, bias, norm) in enumerate(calls()):
        twice = [torch.cat([each.flip(0), each]) for each in (query, key, bias, norm)]
        if step == 1:
            accumulator = accumulator.resolve(slice(2, 4))
        if step >= 1:
            twice = [each[2:] for each in twice]
        *given, norm = twice
        add(accumulator, step // 2, *given, lambda n: n, norm, words=True)
    for one, other in zip(known.layer_sums, read(accumulator).layer_sums, strict=True):
        for name in ("attention_norm", "generated_to_reference_conditional"):
            held = getattr(one, name)
            assert (held is None) == (getattr(other, name) is None)
            if held is not None:
                torch.testing.assert_close(getattr(other, name), held, rtol=1e-6, atol=1e-7)


def test_resized_sums_of_one_grid_are_the_native_ones():
    options = {"reference_mask": MASK, "mask": PAINTED, "layers": ("a", "b"), "words": True}
    native, resized = read(recorded(**options)), read(recorded(sums="resized", **options))
    for source in ("reference 1", "red"):
        how = {"source": source, "values": "norm", "per": "head"}
        one, other = (maps.reference_to_generated(**how) for maps in (native, resized))
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    how = {"source": "reference 2", "normalise": "conditional", "weights": "mask"}
    one, other = (maps.generated_to_reference(**how) for maps in (native, resized))
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)


def test_pair_maps_and_flow_go_along():
    grids = {"time_groups": 2, "pairs": ((4, 3), (2, 3)), "flow": True}
    plain, asked = Accumulator(**grids), Accumulator(**grids, **BOTH)
    for query, key, bias, norm in calls():
        given = {"group": 0, "reference": FIRST, "bias": bias}
        plain.add(ONE, query, key, **given)
        asked.add(ONE, query, key, norms=norm, **given)
    one, other = plain.pairs(), asked.pairs()
    torch.testing.assert_close(other.g2r, one.g2r, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(other.r2g, one.r2g, rtol=1e-5, atol=1e-7)
    how = {"source": "reference 1"}
    for one, other in zip(read(plain).flow(**how), read(asked).flow(**how), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_files_selections_and_merged_results_keep_them(tmp_path):
    maps = read(recorded(words=True, mask=PAINTED))
    maps.save(tmp_path / "maps.safetensors")
    again = load_maps(tmp_path / "maps.safetensors")
    parts = AttributionMaps.merge([maps.select(samples=0), maps.select(samples=1)])
    chosen = maps.select(source="reference 1")
    for other in (again, parts, chosen, maps.to("cpu")):
        how = {"source": "reference 1", "values": "norm"}
        assert torch.equal(other.reference_to_generated(**how), maps.reference_to_generated(**how))
        how = {"source": "reference 1", "normalise": "conditional", "weights": "mask"}
        assert torch.equal(other.generated_to_reference(**how), maps.generated_to_reference(**how))
    plain = read(recorded(values="one", normalise="full", words=True, mask=PAINTED))
    with pytest.raises(ValueError, match="results must agree in the recorded sums of joint"):
        AttributionMaps.merge([maps, plain])


def test_multipliers_multiply_both():
    maps = read(recorded())
    multiplier = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0))
    layers = [replace(layer, multiplier=multiplier) for layer in maps.layer_sums]
    scaled = AttributionMaps(layers, votes=maps.votes, rows=maps.rows, provenance={})
    one, other = (each.reference_to_generated("time", values="norm") for each in (maps, scaled))
    torch.testing.assert_close(other, one * multiplier)
    how = {"per": "time", "source": "reference 1", "normalise": "conditional"}
    one, other = (each.generated_to_reference(**how) for each in (maps, scaled))
    torch.testing.assert_close(other, one * multiplier.mean((-2, -1))[:, None, None])


def test_a_layer_that_is_called_less_often_weighs_alike():
    accumulator = Accumulator(time_groups=2, **BOTH)
    for step, (query, key, bias, norm) in enumerate(calls()):
        for layer in ("often", "rarely"):
            if layer == "often" or step % 2:
                add(accumulator, step // 2, query, key, bias, torch.ones_like, norm, layer)
    maps = read(accumulator)
    by = maps.reference_to_generated("layer", source="reference 1", values="norm")
    share = maps.reference_to_generated("layer", source="reference 1")
    torch.testing.assert_close(by, share, rtol=1e-5, atol=0)


@pytest.mark.parametrize("sums", ["native", "resized"])
def test_where_all_keys_are_the_references_conditional_is_full(sums):
    """And takes no memory; a layer that attends to more as well is added up with its own."""
    alone = replace(make_site("alone", (4, 3), (2, 4)), alone=True)
    more = make_site("more", (4, 3), (2, 4))
    accumulator = Accumulator(time_groups=1, sums=sums, normalise="conditional")
    expected = []
    for query, key, *_ in calls():
        accumulator.add(alone, query, key[:, :, SECOND], group=0)
        accumulator.add(more, query, key, group=0, reference=SECOND)
        scores = 8**-0.5 * query.double() @ key[:, :, SECOND].double().mT
        expected.append(scores.softmax(-1).mean((1, 2)).unflatten(-1, (2, 4)))
    maps = read(accumulator)
    found = maps.generated_to_reference(normalise="conditional")
    close(found, sum(expected))
    if sums == "native":
        assert maps.layer_sums[0].generated_to_reference_conditional is None
        one = maps.select(layers="alone")
        conditional = one.generated_to_reference(normalise="conditional")
        assert torch.equal(conditional, one.generated_to_reference())


def test_unrecorded_and_unknown_readings_are_refused():
    maps = read(recorded(values="one", normalise="full"))
    with pytest.raises(ValueError, match=r'on joint; record them with record\(values="norm"\)'):
        maps.reference_to_generated(values="norm")
    with pytest.raises(ValueError, match=r'joint; record it with record\(normalise="conditional"'):
        maps.generated_to_reference(source="reference 1", normalise="conditional")
    maps = read(recorded())
    with pytest.raises(ValueError, match="values='norm' is of measure='share', got measure='spre"):
        maps.reference_to_generated(values="norm", measure="spread")
    with pytest.raises(ValueError, match="values must be 'one' or 'norm', got 'two'"):
        maps.reference_to_generated(values="two")
    with pytest.raises(ValueError, match="normalise must be 'full' or 'conditional', got 'half'"):
        maps.generated_to_reference(normalise="half")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": "two"}, "values must be one of one, norm, got 'two'"),
        ({"normalise": True}, "normalise must be one of full, conditional, got True"),
        (
            {"values": "norm", "directions": ["generated_to_reference"]},
            "values='norm' needs reference_to_generated among the directions",
        ),
        (
            {"normalise": "conditional", "directions": ["reference_to_generated"]},
            "normalise='conditional' needs generated_to_reference among the directions",
        ),
    ],
)
def test_recordings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Accumulator(**options)


def test_norms_are_given_where_they_are_wanted_alone():
    query, key, bias, norm = next(iter(calls()))
    for values, norms in (("norm", None), ("one", norm)):
        with pytest.raises(ValueError, match="norms must be given for values='norm' and no oth"):
            Accumulator(values=values).add(
                ONE, query, key, group=0, reference=FIRST, bias=bias, norms=norms
            )


def test_prefix_tokens_that_vote_count_as_before():
    """All keys are read then, and the reference tokens are some of them."""
    accumulator = Accumulator(time_groups=1, **BOTH)
    expected, received = [], []
    for query, key, _, norm in calls():
        accumulator.add(ONE, query, key, group=0, reference=FIRST, voters=slice(None), norms=norm)
        p = (8**-0.5 * query.double() @ key.double().mT).softmax(-1)
        expected.append((p * norm.double()[:, :, None] * ones(FIRST)).sum(-1).mean(1))
        p = p[..., FIRST]
        received.append((p / p.sum(-1, keepdim=True)).mean((1, 2)).unflatten(-1, (2, 3)))
    maps = read(accumulator)
    close(
        maps.reference_to_generated(values="norm"),
        sum(expected).unflatten(-1, (4, 3)) / len(expected),
    )
    close(maps.generated_to_reference(normalise="conditional"), sum(received))
