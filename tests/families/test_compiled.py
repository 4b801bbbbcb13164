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


# one of every kind of processor; the other UNets compile for a minute each
COMPILED = (
    "flux kontext",
    "flux adapters",
    "flux2 klein kv",
    "qwen edit plus",
    "chroma",
    "sd3 adapter",
    "zimage",
    "zimage omni",
    "sd adapters",
    "paint by example",
    "own custom",
    "wan 2.2 t2v",
    "wan i2v",
)


@pytest.mark.parametrize("name", COMPILED)
def test_maps_of_a_compiled_denoiser(name):
    model = FAMILIES[name]()
    for network in model.networks:
        network.compile(backend="aot_eager")
    plain = model.run()
    maps, image = recorded(model, sums="native")
    assert torch.equal(image, plain)
    oracle.assert_maps(maps, known("families", name).wanted)
