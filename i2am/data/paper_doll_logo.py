"""Glyphs on the chest of paper-doll garments: distinctive marks at a known place."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# fp32; the annotations of numpy promote it to fp64 beside a Python float
Array = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Logo:
    """One glyph on the chest: its shape, centre, radius, tilt in radians, and colour."""

    shape: str
    centre: tuple[float, float]
    radius: float
    tilt: float
    colour: Colour

    def covers(self, u: Array, v: Array) -> Bools:
        """Where the glyph is, of the shape of ``u`` and ``v``."""
        cos, sin = math.cos(self.tilt) / self.radius, math.sin(self.tilt) / self.radius
        du, dv = u - self.centre[0], v - self.centre[1]
        x = du * cos + dv * sin
        y = dv * cos - du * sin
        return _GLYPHS[self.shape](x, y)


def _ring(x: Array, y: Array) -> Bools:
    square = x * x + y * y
    return (square < 1) & (square > 0.3)


def _cross(x: Array, y: Array) -> Bools:
    x, y = np.abs(x), np.abs(y)
    return (np.minimum(x, y) < 0.3) & (np.maximum(x, y) < 0.95)


def _triangle(x: Array, y: Array) -> Bools:
    return (y < 0.75) & (2 * np.abs(x) < y + 1)


def _heart(x: Array, y: Array) -> Bools:
    x = np.abs(x)
    lobes = (x - 0.45) ** 2 + (y + 0.35) ** 2 < 0.27
    return lobes | ((y > -0.35) & (x + 0.75 * y < 0.72) & (x < 0.97))


def _star(x: Array, y: Array) -> Bools:
    # in at least four of the five half planes through neighbouring tips
    inside = np.zeros(x.shape, np.uint8)
    for tip in range(5):
        angle = math.pi / 2 + 2 * math.pi * tip / 5
        inside += x * math.cos(angle) + y * math.sin(angle) < 0.34
    return inside >= 4


def _bars(x: Array, y: Array) -> Bools:
    step = (y + 0.95) * (5 / 1.9)
    return (np.abs(x) < 0.85) & (np.abs(y) < 0.95) & (np.floor(step) % 2 == 0)


def _letter(x: Array, y: Array) -> Bools:
    # an F: it has no symmetry
    stem = (x > -0.65) & (x < -0.2)
    arms = (x >= -0.2) & (((y < -0.5) & (x < 0.7)) | ((y > -0.15) & (y < 0.25) & (x < 0.45)))
    return (np.abs(y) < 0.95) & (stem | arms)


def _crescent(x: Array, y: Array) -> Bools:
    return (x * x + y * y < 1) & ((x - 0.45) ** 2 + y * y > 0.5)


_GLYPHS = {
    "ring": _ring,
    "cross": _cross,
    "triangle": _triangle,
    "heart": _heart,
    "star": _star,
    "bars": _bars,
    "letter": _letter,
    "crescent": _crescent,
}
LOGOS = tuple(_GLYPHS)
