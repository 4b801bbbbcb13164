"""Recordings of whole pipelines against whole attention matrices, family by family."""

import warnings

import family_oracle as oracle
import pytest
import torch
from family_cases import FAMILIES

import i2am


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def recorded(model, **options):
    """What a run leaves, and its image."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*recorded are the words of the prompt")
        recorder = i2am.record(model.pipe, **model.options | options)
    with recorder:
        image = model.run()
    return recorder.maps(), image


def spied(model):
    with oracle.spied(model.networks, model.scheduler) as calls:
        model.run()
    return calls


@pytest.mark.usefixtures("small_references")
def test_maps_are_those_of_whole_softmaxes(family):
    model = family()
    plain = model.run()
    wanted = oracle.expected(spied(model), model.of, model.groups)
    maps, image = recorded(model, sums="native")
    assert torch.equal(image, plain)
    oracle.assert_maps(maps, wanted)
