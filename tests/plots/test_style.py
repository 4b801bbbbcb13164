"""The two looks, measured: colours against matplotlib's, blending against its formula."""

import matplotlib
import numpy as np
import pytest

from i2am.plots import heat, overlay
from i2am.plots.style import color_table


def test_paper_colours_are_jet():
    jet = matplotlib.colormaps["jet"](np.linspace(0, 1, 256), bytes=True)[:, :3]
    # matplotlib cuts levels off, we round them
    assert np.abs(color_table("paper").astype(int) - jet).max() <= 1


def test_default_colours_are_inferno():
    inferno = matplotlib.colormaps["inferno"](np.linspace(0, 1, 256), bytes=True)[:, :3]
    # ten stops and straight lines between them
    assert np.abs(color_table("default").astype(int) - inferno).max() <= 10


def test_paper_overlay_adds_colours_everywhere_and_cuts_off(image):
    below, values = image((70, 9)), np.linspace(0, 1, 630).reshape(70, 9)
    below[0, 0], values[0, 0] = 255, 0.66
    result = overlay(below, values, style="paper")
    wanted = 0.7 * below + 0.5 * heat(values, style="paper")
    assert (result == np.rint(np.minimum(wanted, 255))).all()
    assert result[0, 0].tolist() == [255, 255, 178]
    # a map of zeros is not the image: the published code lays dark blue on it
    empty = overlay(np.zeros((1, 1, 3), np.uint8), [[0.0]], style="paper")
    assert empty[0, 0].tolist() == [0, 0, 64]


def test_colours_cannot_be_changed_by_accident():
    with pytest.raises(ValueError, match="read-only"):
        color_table()[0] = 1


@pytest.mark.parametrize(
    ("call", "match"),
    [
        pytest.param(
            lambda: heat([[0.5]], style="jet"),
            r"style must be 'default' or 'paper', got 'jet'",
            id="style",
        ),
        pytest.param(
            lambda: overlay(np.zeros((1, 1, 3), np.uint8), [[0.5]], alpha=0.5, style="paper"),
            r"alpha must be left out for style 'paper'",
            id="alpha",
        ),
    ],
)
def test_refusals(call, match):
    with pytest.raises(ValueError, match=match):
        call()
