"""Recordings of compiled denoisers, family by family: as eager ones."""

import family_oracle as oracle
import pytest
import torch
from family_cases import FAMILIES
from family_known import known, recorded

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("small_references"),
    pytest.mark.filterwarnings(
        "ignore:.*recorded are the words of the prompt", "ignore:layers with a single reference"
    ),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_of_a_compiled_denoiser(name):
    model = FAMILIES[name]()
    for network in model.networks:
        network.compile(backend="aot_eager")
    plain = model.run()
    maps, image = recorded(model, sums="native")
    assert torch.equal(image, plain)
    oracle.assert_maps(maps, known("families", name).wanted)
