"""Recordings of whole pipelines against whole attention matrices, family by family."""

from dataclasses import replace

import family_oracle as oracle
import pytest
import torch
from family_cases import BATCHES, FAMILIES
from family_known import known, recorded, spied
from family_words import PROMPTED

import i2am

pytestmark = [
    pytest.mark.usefixtures("small_references"),
    pytest.mark.filterwarnings(
        "ignore:.*recorded are the words of the prompt", "ignore:layers with a single reference"
    ),
]
every_family = pytest.mark.parametrize("name", FAMILIES)
every_prompted = pytest.mark.parametrize("name", PROMPTED)


@every_family
def test_maps_are_those_of_whole_softmaxes(name):
    of = known("families", name)
    oracle.assert_maps(of.maps, of.wanted)


# the others are the same to a batch
QUICK = (
    "flux kontext",
    "flux2 klein kv",
    "qwen",
    "qwen edit plus",
    "sd3 adapter",
    "zimage",
    "sd, some words",
    "own custom",
    "catvton",
    "wan 2.2 t2v",
)


@pytest.mark.parametrize(
    "name",
    [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in BATCHES],
)
def test_samples_of_a_batch_have_their_own_maps(name):
    of = known("batches", name)
    assert of.maps.n_samples == of.model.samples > 1
    oracle.assert_maps(of.maps, of.wanted)
    first = next(iter(of.wanted.values()))
    spread = next(sums.spread for sums in of.wanted.values() if sums.spread.any())
    assert not torch.allclose(spread[0], spread[1], rtol=1e-3), first


@every_prompted
def test_words_are_found_where_the_encoders_put_them(name):
    of = known("prompted", name)
    wanted = {key: sums for key, sums in of.wanted.items() if key[1] != "all"}
    oracle.assert_maps(of.maps, wanted)


@every_prompted
def test_every_token_is_of_one_word(name):
    of = known("prompted", name)
    maps, _ = recorded(of.model, sums="native", words=True)
    axes = ("time", "head", "frame") if maps.frames > 1 else ("time", "head")
    for (layer, word), sums in of.wanted.items():
        if word != "all":
            continue
        own = maps.select(layers=layer)
        shares = [
            own.reference_to_generated(axes, source=source, measure="share")
            for source in maps.words
        ]
        share = sums.share / sums.calls[..., None, None]
        oracle.assert_close(sum(shares).flatten(3), share, f"share of all words in {layer}")


@every_family
def test_resized_sums_are_the_average_over_layers_and_heads(name):
    of = known("families", name)
    maps, _ = recorded(of.model, sums="resized")
    assert maps.layers == ("resized",)
    oracle.assert_averaged(maps, of.wanted)
    oracle.assert_averaged(of.maps, of.wanted)


# what an adapter adds has a softmax of its own, multiplied by its scale
ADAPTERS = {
    "flux adapters": 0.7 + 0.5,
    "flux kontext adapters": 0.7 + 0.5,
    "sd adapters": 0.6 + 0.3,
    "sd adapter of two images": 0.6,
    "sdxl adapter": 0.6,
    "sd3 adapter": 1.0,
    "wan i2v": 1.0,
}
# references whose branches have different scales
SCALED = ("flux adapters", "flux kontext adapters", "sd adapters")
# every key is of a source, and there is one softmax
WHOLE = (
    "sd",
    "sdxl",
    "sd inpaint",
    "wan t2v",
    "wan 2.2 t2v",
    "wan 2.2 i2v",
    "paint by example",
    "own paint by example",
    "own dci-vton",
    "own stableviton",
)


@every_family
def test_shares_of_all_sources_are_parts_of_one(name):
    of = known("families", name)
    for layer in of.maps.layers:
        own = of.maps.select(layers=layer)
        shares = {
            source: own.reference_to_generated(("time", "head"), source=source, measure="share")
            for source in own.sources
        }
        total = sum(shares.values())
        assert total.max() <= 1 + ADAPTERS.get(name, 0) + 1e-5
        assert total.min() > 0
        if name in WHOLE:
            oracle.assert_close(total, torch.ones_like(total).double(), f"all shares in {layer}")
        given = oracle.references(own)
        if name in SCALED and len(given) > 1:
            with pytest.raises(ValueError, match="one reference where their branches are multipl"):
                own.reference_to_generated(measure="share")
        elif given:
            together = own.reference_to_generated(("time", "head"), measure="share")
            every = sum(shares[source] for source in given).double()
            oracle.assert_close(together, every, f"share of all references in {layer}")


@pytest.mark.parametrize("name", ["wan 2.2 t2v", "wan 2.2 i2v"])
@pytest.mark.parametrize("sums", ["native", "resized"])
def test_both_denoisers_fill_their_time_groups(name, sums):
    model = FAMILIES[name]()
    calls = spied(model)
    met = [0, 0]
    for number, network in enumerate(model.networks):
        network.register_forward_pre_hook(
            lambda *_, number=number: met.__setitem__(number, met[number] + 1)
        )
    with i2am.record(model.pipe, words=model.words, time_groups=4, sums=sums) as recorder:
        model.run()
    # a run of four steps, each of two calls, and three quarters of a high-noise denoiser
    assert min(met) >= 2
    assert sum(met) == 8
    maps = recorder.maps()
    for word in model.words:
        share = maps.reference_to_generated("time", source=word, measure="share")
        assert share.shape[1] == 4
        assert share.flatten(2).amin(-1).min() > 0
    wanted = oracle.expected(calls, model.of, range(4))
    assert all(bool((sums.calls == 1).all()) for sums in wanted.values())
    oracle.assert_averaged(maps, wanted)


def test_spans_that_move_into_a_cache_are_counted_in_every_step():
    """FLUX.2 klein-KV has its references in the first step's sequence, then in a cache."""
    model = FAMILIES["flux2 klein kv"]()
    calls = [call for call in spied(model) if not call.index]
    lengths = {call.evaluation: call.seqlen_q for call in calls}
    assert lengths == dict.fromkeys(range(3), 5 + 35)
    maps, _ = recorded(model, sums="native", time_groups=3)
    wanted = oracle.expected(calls, model.of, range(3))
    assert all(bool((sums.calls == 1).all()) for sums in wanted.values())
    oracle.assert_maps(maps, wanted)


# what the guidance branches of a batch, or of two calls, are; the rest has texts of two lengths
OTHER = {
    "own custom": "second",
    "own stableviton": "second call",
    "own paint by example": "first",
    "paint by example": "first",
    "catvton": "first",
    "idm-vton": "first",
    "ootdiffusion": "second",
    "sd3 adapter": "first",
    "sd adapters": "first",
    "flux kontext, true guidance": "second call",
}


@pytest.mark.parametrize("name", OTHER)
def test_both_branches_of_guidance(name):
    of = known("families", name)
    references = {key: sums for key, sums in of.wanted.items() if isinstance(key[1], int)}
    other = replace(of.model, part=OTHER[name])
    unwanted = oracle.expected(spied(other), other.of, other.groups)
    with i2am.record(of.model.pipe, branch="both", time_groups=2, sums="native") as recorder:
        of.model.run()
    oracle.assert_maps(recorder.maps("conditional"), references)
    without = {key: sums for key, sums in unwanted.items() if isinstance(key[1], int)}
    oracle.assert_maps(recorder.maps("unconditional"), without)
    key = next(iter(references))
    assert not torch.allclose(references[key].spread, without[key].spread, rtol=1e-3)
