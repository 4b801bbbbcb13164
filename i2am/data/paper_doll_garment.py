"""Paper-doll garments: outline, texture and logo as functions of canonical coordinates (u, v).

The collar is at v = -0.5 and the hem near v = +0.5; u = 0 is the vertical axis, positive towards
the right of the picture, which is the left side of the wearer. Whatever picture shows a garment,
it asks this module for the colour at (u, v): that is what makes the correspondence exact.
"""

import colorsys
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from i2am.data.paper_doll_logo import LOGOS, Array, Bools, Colour, Logo

TEXTURES = (
    "plain",
    "horizontal stripes",
    "vertical stripes",
    "checks",
    "dots",
    "two colours",
    "patchwork",
    "smooth patchwork",
)

SLEEVE_START = (0.185, -0.35)
"""Where the axis of the sleeve of the positive side starts."""
SLEEVE_AXIS = (math.cos(1.01), math.sin(1.01))
"""Unit direction of that axis; the upper arm of every person lies on it."""
# the mask of a person must hide every garment, so these bound all outlines
WIDEST, LONGEST, LONGEST_SLEEVE, WIDEST_SLEEVE = 0.32, 0.51, 0.44, 0.12


def sleeve_coordinates(u: Array, v: Array) -> tuple[Array, Array]:
    """Distance along the sleeve's axis and across it, for both sides at once by symmetry."""
    along, down = SLEEVE_AXIS
    side = np.abs(u)
    side -= SLEEVE_START[0]
    drop = v - SLEEVE_START[1]
    return side * along + drop * down, drop * along - side * down


@dataclass(frozen=True)
class Garment:
    """A T-shirt and its place on its own picture; a pure function of the numbers drawn for it.

    ``scale`` is in pixels per canonical unit and ``origin`` the pixel (x, y) of u = v = 0.
    """

    texture: str
    colours: tuple[Colour, ...]  # one, two, or 5 x 4 by rows
    period: float
    phase: tuple[float, float]
    logo: Logo | None
    chest: float
    hem_width: float
    hem: float
    neck: tuple[float, float]  # half width and depth
    pointed: bool
    sleeve: tuple[float, float, float]  # length, half width at the shoulder, taper
    ground: Colour
    scale: tuple[float, float]
    angle: float
    origin: tuple[float, float]

    def covers(self, u: Array, v: Array, sleeve: tuple[Array, Array]) -> tuple[Bools, Bools]:
        """Where the garment is, and which part of that is sleeve.

        Args:
            u: Canonical coordinates across, any shape.
            v: Canonical coordinates down, of that shape.
            sleeve: What :func:`sleeve_coordinates` says of them.
        """
        side = np.abs(u)
        along, across = sleeve
        sides = side < self.chest + (self.hem_width - self.chest) * (v + 0.5)
        body = sides & (v < self.hem - 0.12 * side * side)
        neck, depth = self.neck
        body &= v > -0.5 + 0.5 * (side - neck)
        drop = np.maximum(v + 0.5, 0) / depth
        beside = side / neck
        body &= (beside + drop if self.pointed else beside * beside + drop * drop) > 1
        length, width, taper = self.sleeve
        arm = (along > 0) & (along < length) & (np.abs(across) < width - taper * along)
        arm &= ~sides
        return body | arm, arm

    def colour(self, u: Array, v: Array) -> Array:
        """The texture without its logo: ``[3, ...]`` for coordinates of shape ``[...]``."""
        palette = np.array(self.colours, np.float32).T
        if self.texture == "smooth patchwork":
            return self._smooth(palette, u, v)
        return palette.take(self._index(u, v), axis=1)

    def on_picture(self, u: Array, v: Array) -> tuple[Array, Array]:
        """The pixel coordinates (y, x) of canonical coordinates on the garment's own picture."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        x, y = u * self.scale[0], v * self.scale[1]
        return x * sin + y * cos + self.origin[1], x * cos - y * sin + self.origin[0]

    def canonical(self, xs: Array, ys: Array) -> tuple[Array, Array]:
        """(u, v) of the pixels of a picture with columns ``xs`` and rows ``ys``, in pixels."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        x, y = xs[None] - self.origin[0], ys[:, None] - self.origin[1]
        return (x * cos + y * sin) / self.scale[0], (y * cos - x * sin) / self.scale[1]

    def _index(self, u: Array, v: Array) -> NDArray[np.intp]:
        if self.texture == "plain":
            return np.zeros(u.shape, np.intp)
        if self.texture == "patchwork":
            row, column = np.floor((v + 0.5) * 5), np.floor((u + 0.5) * 4)
            return (row.clip(0, 4) * 4 + column.clip(0, 3)).astype(np.intp)
        if self.texture == "two colours":
            return ((u if self.period < 0 else v) > self.phase[0]).astype(np.intp)
        rows, columns = v / self.period + self.phase[0], u / self.period + self.phase[1]
        rows -= np.floor(rows)
        columns -= np.floor(columns)
        if self.texture == "dots":
            rows -= 0.5
            columns -= 0.5
            return (rows * rows + columns * columns < 0.09).astype(np.intp)
        if self.texture == "horizontal stripes":
            return (rows < 0.5).astype(np.intp)
        if self.texture == "vertical stripes":
            return (columns < 0.5).astype(np.intp)
        return ((rows < 0.5) ^ (columns < 0.5)).astype(np.intp)

    def _smooth(self, palette: Array, u: Array, v: Array) -> Array:
        row, column = ((v + 0.5) * 5 - 0.5).clip(0, 4), ((u + 0.5) * 4 - 0.5).clip(0, 3)
        top, left = np.minimum(row.astype(np.intp), 3), np.minimum(column.astype(np.intp), 2)
        down, right = row - top, column - left
        corner = top * 4 + left
        upper = (
            palette.take(corner, axis=1) * (1 - right) + palette.take(corner + 1, axis=1) * right
        )
        lower = (
            palette.take(corner + 4, axis=1) * (1 - right)
            + palette.take(corner + 5, axis=1) * right
        )
        return upper * (1 - down) + lower * down


def draw_garment(random: np.random.Generator, size: tuple[int, int]) -> Garment:
    """Draws a garment and a place for it on a picture of ``size`` (height, width)."""

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(random.random())

    texture = TEXTURES[int(random.random() * len(TEXTURES))]
    ground: Colour = (between(0.88, 1.0),) * 3
    ground = tuple(min(1.0, level + between(-0.03, 0.03)) for level in ground)  # type: ignore[assignment]
    count = {"plain": 1, "patchwork": 20, "smooth patchwork": 20}.get(texture, 2)
    colours: list[Colour] = []
    for _ in range(count):
        if count == 20:  # no black, white or grey: they are the logo's
            colours.append(
                colorsys.hsv_to_rgb(between(0, 1), between(0.45, 0.95), between(0.4, 0.9))
            )
        else:
            drawn = [_colour(random, light=0.7) for _ in range(3)]
            colours.append(_farthest(drawn, [ground, *colours]))
    period = {"dots": between(0.2, 0.28), "checks": between(0.3, 0.44)}.get(
        texture, between(0.18, 0.34)
    )
    phase = (between(0, 1), between(0, 1))
    if texture == "two colours":
        across = random.random() < 0.4
        period = -1.0 if across else 1.0
        phase = (between(-0.08, 0.08) if across else between(-0.15, 0.2), 0.0)
    chest, hem_width = between(0.265, 0.3), between(0.27, WIDEST)
    radius = between(0.125, 0.165)
    free = chest - radius - 0.02
    inks = (
        [(0.03,) * 3, (0.99,) * 3]
        if count == 20
        else [_colour(random, light=0.95) for _ in range(6)]
    )
    logo = Logo(
        LOGOS[int(random.random() * len(LOGOS))],
        (between(-free, free), between(-0.28 + radius, 0.42 - radius)),
        radius,
        between(-0.35, 0.35),
        _farthest(inks, colours),
    )
    sleeve = (between(0.34, LONGEST_SLEEVE), between(0.1, WIDEST_SLEEVE), between(0, 0.06))
    hem = between(0.44, LONGEST)
    height, width = size
    tip = SLEEVE_START[0] + SLEEVE_AXIS[0] * sleeve[0] + SLEEVE_AXIS[1] * sleeve[1]
    aspect, angle = between(0.94, 1.06), between(-0.06, 0.06)
    # 4 pixels of ground on either side, and room for the corners that the angle turns outwards
    scale = min(between(0.62, 1.0) * 0.75 * height, (width - 8) / (2 * (tip + 0.02) * aspect))
    half_width = (tip + 0.02) * scale * aspect
    x = _near_ends(random, half_width + 3, width - half_width - 3)
    y = _near_ends(random, 0.52 * scale + 4, height - (hem + 0.03) * scale - 4)
    return Garment(
        texture=texture,
        colours=tuple(colours),
        period=period,
        phase=phase,
        logo=logo if random.random() < 5 / 6 else None,
        chest=chest,
        hem_width=hem_width,
        hem=hem,
        neck=(between(0.1, 0.135), between(0.07, 0.13)),
        pointed=bool(random.random() < 0.3),
        sleeve=sleeve,
        ground=ground,
        scale=(scale * aspect, scale),
        angle=angle,
        origin=(x, y),
    )


def _farthest(colours: list[Colour], rivals: list[Colour]) -> Colour:
    return max(colours, key=lambda colour: min(math.dist(colour, rival) for rival in rivals))


def _near_ends(random: np.random.Generator, low: float, high: float) -> float:
    # more often near an end: a garment in the middle would lie where it lies on the person
    return low + (high - low) * (0.5 - 0.5 * math.cos(math.pi * float(random.random())))


def _colour(random: np.random.Generator, light: float) -> Colour:
    """A saturated colour, near black, or a light grey around the level ``light``."""
    kind, hue, saturation, value = (float(number) for number in random.random(4))
    if kind < 0.1:
        return (0.04 + 0.1 * value,) * 3
    if kind < 0.2:
        return (light - 0.05 + 0.1 * value,) * 3
    return colorsys.hsv_to_rgb(hue, 0.35 + 0.6 * saturation, 0.35 + 0.6 * value)
