"""Images and maps to draw, and the seams through which a figure is read."""

import numpy as np
import pytest
import torch

GENERATED = (48, 36)
REFERENCE = (40, 50)


@pytest.fixture
def image():
    """Makes a noisy picture of a size."""

    def make(size=GENERATED, seed=0):
        return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)

    return make


@pytest.fixture
def maps():
    """Makes random raw maps ``[..., height, width]``."""

    def make(*shape, seed=0):
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def panels():
    """The panels of a figure, row by row: title and pixels; None for an empty place."""

    def read(figure):
        *axes, _bar = figure.axes
        rows = {}
        for place in axes:
            pixels = place.images[0].get_array() if place.images else None
            row = place.get_subplotspec().rowspan.start
            rows.setdefault(row, []).append((place.get_title(), pixels))
        return [rows[row] for row in sorted(rows)]

    return read
