"""Recordings of whole pipelines against whole attention matrices, family by family."""

import functools
import warnings

import family_oracle as oracle
import pytest
import torch
from family_cases import BATCHES, FAMILIES
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


def recorded(model, **options):
    """What a run leaves, and its image."""
    with i2am.record(model.pipe, **model.options | options) as recorder:
        image = model.run()
    return recorder.maps(), image


def spied(model):
    with oracle.spied(model.networks, model.scheduler) as calls:
        model.run()
    return calls


class Known:
    """A family, what its attention really is, and what was recorded of it."""

    def __init__(self, make):
        self.model = make()
        plain = self.model.run()
        self.wanted = oracle.expected(spied(self.model), self.model.of, self.model.groups)
        self.maps, image = recorded(self.model, sums="native")
        assert torch.equal(image, plain)


@functools.cache
def known(table, name):
    return Known({"families": FAMILIES, "batches": BATCHES, "prompted": PROMPTED}[table][name])


@every_family
def test_maps_are_those_of_whole_softmaxes(name):
    of = known("families", name)
    oracle.assert_maps(of.maps, of.wanted)


@pytest.mark.parametrize("name", BATCHES)
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
