"""What is recorded of the full-size systems, against numbers worked out by hand."""

from collections import Counter

import pytest
import systems
from shapes import CUSTOM, SINGLE_TOKEN, WARP

from i2am.models.conversion.describing import empty_pipeline

pytestmark = pytest.mark.slow  # they test no product

# UNet levels with cross-attention, 3 in the decoder and 2 in the encoder each; 1 in the middle
SQUARE = Counter({(64, 64): 5, (32, 32): 5, (16, 16): 5, (8, 8): 1})
UPRIGHT = Counter({(64, 48): 5, (32, 24): 5, (16, 12): 5, (8, 6): 1})
WARPS = Counter({(16, 12): 3, (32, 24): 3, (64, 48): 3})
CELLS = {"square": 5 * (4096 + 1024 + 256) + 64, "upright": 5 * (3072 + 768 + 192) + 48}
WARP_CELLS = 3 * (192 + 768 + 3072)
# fp32, 5 time groups, 8 heads: spread and share per generated cell, G2R per reference token; and
# how often each layer was called
BYTES = {
    "paint-by-example": 4 * 5 * (8 * 2 * CELLS["square"] + 16),
    "dci-vton": 4 * 5 * (8 * 2 * CELLS["square"] + 16),
    "stableviton": 4 * 5 * (8 * 3 * WARP_CELLS + 9),
    "custom": 4 * 5 * (8 * (2 * CELLS["upright"] + 16 * 1036) + 16),
}
# the finest grid at each end, whatever the number of layers
RESIZED = {
    "paint-by-example": 4 * 5 * (8 * 2 * 4096 + 1),
    "dci-vton": 4 * 5 * (8 * 2 * 4096 + 1),
    "stableviton": 4 * 5 * (8 * 3 * 3072 + 1),
    "custom": 4 * 5 * (8 * (2 * 3072 + 1036) + 1),
}
GRIDS = {
    "paint-by-example": SQUARE,
    "dci-vton": SQUARE,
    "stableviton": WARPS,
    "custom": UPRIGHT,
}
SHAPES = {
    "paint-by-example": SINGLE_TOKEN,
    "dci-vton": SINGLE_TOKEN,
    "stableviton": WARP,
    "custom": CUSTOM,
}


@pytest.mark.parametrize("name", GRIDS)
def test_layers_grids_keys_and_bytes(name) -> None:
    pipe = empty_pipeline(name, {})
    layers = systems.recorded_layers(pipe, pipe.attribution_layout())
    assert Counter(layer.site.generated_grid for layer in layers) == GRIDS[name]
    # the shapes that are benchmarked are these
    found = Counter((layer.seqlen_q, layer.seqlen_k, layer.head_dim) for layer in layers)
    assert found == {(s.seqlen_q, s.seqlen_k, s.head_dim): s.calls for s in SHAPES[name]}
    assert {layer.site.heads for layer in layers} == {8}
    assert systems.kept_bytes(layers) == BYTES[name]
    assert systems.kept_bytes(layers, sums="resized") == RESIZED[name]


def test_table() -> None:
    pipe = empty_pipeline("dci-vton", {})
    layers = systems.recorded_layers(pipe, pipe.attribution_layout())
    head, rule, row = systems.table({"dci-vton": layers}).splitlines()
    assert head.count("|") == rule.count("|") == row.count("|")
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[:3] == [
        "dci-vton",
        "16",
        "5 of 64 x 64, 5 of 32 x 32, 5 of 16 x 16, 1 of 8 x 8",
    ]
    assert cells[5] == "1"
    assert cells[6] == "8.2 MiB"


def test_the_unets_layers_of_stableviton_on_request() -> None:
    pipe = empty_pipeline("stableviton", {})
    layers = systems.recorded_layers(pipe, pipe.attribution_layout(unet_layers=True))
    single = [layer for layer in layers if layer.seqlen_k == 1]
    assert Counter(layer.site.generated_grid for layer in single) == UPRIGHT
    assert not any(layer.site.informative for layer in single)
    assert len(layers) == 16 + 9
