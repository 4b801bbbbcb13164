"""Two looks: the colours of a map, and how they are laid over an image.

``"default"`` is perceptual and safe in print: inferno, whose brightness rises throughout, over the
image in grey. ``"paper"`` is what the published code draws: jet, image x 0.7 + colours x 0.5, also
where the map is 0.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]

STYLES = ("default", "paper")
ALPHA = 0.85
"""Opacity of the default style's colours at values of 0.5 and more."""

# inferno (van der Walt and Smith, CC0) at ten equal steps, values 0 to 1
_INFERNO = "000004 1b0c42 4b0c6b 781c6d a52c60 cf4446 ed6925 fb9a06 f7d03c fcffa4"
# jet's corners per channel: places, levels
_JET = (
    ((0, 0.35, 0.66, 0.89, 1), (0, 0, 1, 1, 0.5)),
    ((0, 0.125, 0.375, 0.64, 0.91, 1), (0, 0, 1, 1, 0, 0)),
    ((0, 0.11, 0.34, 0.65, 1), (0.5, 1, 1, 0, 0)),
)
_IMAGE, _HEAT = 0.7, 0.5


def check_style(style: str) -> str:
    """The style, if there is one of that name.

    Raises:
        ValueError: There is none.
    """
    if style not in STYLES:
        raise ValueError(f"style must be 'default' or 'paper', got {style!r}")
    return style


def color_table(style: str = "default") -> Picture:
    """Colours of the values 0, 1/255, ..., 1.

    Args:
        style: "default" or "paper".

    Returns:
        uint8 ``[256, 3]``, read-only.

    Raises:
        ValueError: The style is unknown.
    """
    return _color_table(check_style(style))


def colors(unit: NDArray[np.floating], style: str = "default") -> Picture:
    """Colours of values in [0, 1], any shape: uint8 ``[..., 3]``."""
    return color_table(style)[np.rint(unit * 255).astype(np.intp)]


def blend(
    picture: Picture, unit: NDArray[np.floating], *, style: str, alpha: float
) -> NDArray[np.floating]:
    """Levels ``[height, width, 3]``, not rounded, of a map's colours over a picture.

    Args:
        picture: uint8 ``[height, width, 3]``.
        unit: ``[height, width]`` in [0, 1].
        style: "default" or "paper".
        alpha: Opacity in the default style, where it grows with the value up to 0.5.
    """
    heat = colors(unit, style)
    if style == "paper":
        return np.minimum(_IMAGE * picture + _HEAT * heat, 255)
    grey = picture @ np.array([0.299, 0.587, 0.114])
    backdrop = 0.25 * picture + 0.75 * grey[..., None]
    weight = (alpha * np.minimum(2 * unit, 1))[..., None]
    return (1 - weight) * backdrop + weight * heat


@cache
def _color_table(style: str) -> Picture:
    steps = np.linspace(0, 1, 256)
    if style == "paper":
        channels = [np.interp(steps, places, levels) * 255 for places, levels in _JET]
    else:
        stops = np.array([list(bytes.fromhex(stop)) for stop in _INFERNO.split()], dtype=float)
        places = np.linspace(0, 1, len(stops))
        channels = [np.interp(steps, places, stops[:, channel]) for channel in range(3)]
    table = np.rint(np.stack(channels, axis=1)).astype(np.uint8)
    table.flags.writeable = False
    return table
