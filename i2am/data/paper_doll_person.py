"""Paper-doll persons: a smooth map from the picture to canonical coordinates, and a body under it.

The map is a sinusoidal warp, an affine map, and a bend of each arm; the garment, its sleeves and
the upper arms all go through it. Nothing here knows which garment is worn.
"""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from i2am.data.paper_doll_garment import (
    LONGEST,
    LONGEST_SLEEVE,
    SLEEVE_AXIS,
    SLEEVE_START,
    WIDEST,
    WIDEST_SLEEVE,
    Array,
    Bools,
    Colour,
)

PARTS = (
    "background",
    "hair",
    "face",
    "neck",
    "left arm",
    "right arm",
    "left leg",
    "right leg",
    "torso",
    "left sleeve",
    "right sleeve",
    "logo",
)
"""What the labels of a scene mean; left and right are the wearer's. The last four are garment."""
(BACKGROUND, HAIR, FACE, NECK, LEFT_ARM, RIGHT_ARM, LEFT_LEG, RIGHT_LEG) = range(8)
GARMENT = PARTS.index("torso")

_ELBOW, _ARM, _BEND = 0.54, 0.062, 0.2
_SKIN = (
    (0.98, 0.86, 0.77),
    (0.94, 0.78, 0.66),
    (0.87, 0.67, 0.53),
    (0.77, 0.56, 0.42),
    (0.62, 0.43, 0.31),
    (0.47, 0.31, 0.22),
    (0.34, 0.22, 0.16),
)
_HAIR = (
    (0.09, 0.07, 0.06),
    (0.24, 0.15, 0.09),
    (0.42, 0.26, 0.14),
    (0.80, 0.62, 0.34),
    (0.55, 0.20, 0.10),
    (0.60, 0.58, 0.56),
)


@dataclass(frozen=True)
class Person:
    """Where a person stands, how it holds its arms, and its colours; lengths are in pixels."""

    centre: tuple[float, float]
    matrix: tuple[tuple[float, float], tuple[float, float]]  # canonical (u, v) to pixels (x, y)
    warp: tuple[tuple[float, float, float], tuple[float, float, float]]  # size, frequency, phase
    bend: tuple[float, float]  # of the sleeve at positive and at negative u
    joints: dict[str, tuple[float, float]]  # OpenPose's names, pixels (x, y)
    unit: float  # pixels per canonical unit
    long_hair: bool
    colours: dict[int, Colour]
    gradient: tuple[Colour, tuple[float, float]]  # added at the far end, and its direction

    def canonical(self, xs: Array, ys: Array) -> tuple[Array, Array]:
        """(u, v) of every pixel, ``[len(ys), len(xs)]``; columns and rows are in pixels."""
        return _canonical(self.centre, self.matrix, self.warp, self.bend, xs, ys)

    def back(self, canvas: "Canvas", sleeve: tuple[Array, Array], u: Array) -> None:
        """Paints what a garment may hide: long hair, legs, neck and upper arms."""
        at, unit = self.joints, self.unit
        if self.long_hair:
            head, neck = at["head"], at["chest"]
            canvas.capsule(head, neck, 0.2 * unit, 0.22 * unit, HAIR)
        for side, label in (("left", LEFT_LEG), ("right", RIGHT_LEG)):
            canvas.capsule(at[f"{side} hip"], at[f"{side} knee"], 0.145 * unit, 0.11 * unit, label)
        canvas.capsule(at["head"], at["neck"], 0.075 * unit, 0.08 * unit, NECK)
        canvas.capsule(at["left collar"], at["right collar"], 0.085 * unit, 0.085 * unit, NECK)
        along, across = sleeve
        arm = (np.abs(across) < _ARM) & (along > 0.1) & (along < _ELBOW)
        canvas.labels[arm & (u > 0)] = LEFT_ARM
        canvas.labels[arm & (u < 0)] = RIGHT_ARM

    def front(self, canvas: "Canvas") -> None:
        """Paints what hides a garment: head, forearms and hands."""
        at, unit = self.joints, self.unit
        hair, chin = at["crown"], at["chin"]
        canvas.capsule(hair, at["head"], 0.165 * unit, 0.155 * unit, HAIR)
        canvas.capsule(at["nose"], chin, 0.13 * unit, 0.095 * unit, FACE)
        for side, label in (("left", LEFT_ARM), ("right", RIGHT_ARM)):
            elbow, wrist = at[f"{side} elbow"], at[f"{side} wrist"]
            canvas.capsule(elbow, wrist, 0.06 * unit, 0.05 * unit, label)
            canvas.capsule(wrist, at[f"{side} hand"], 0.055 * unit, 0.05 * unit, label)

    def surface(self, u: Array, v: Array, sleeve: tuple[Array, Array]) -> Bools:
        """Torso and upper arms of the body, where a pose map shows (u, v)."""
        side, (along, across) = np.abs(u), sleeve
        torso = (side < 0.27) & (v < 0.47) & (v > -0.5 + 0.5 * (side - 0.1))
        return torso | ((np.abs(across) < 0.09) & (along > 0) & (along < _ELBOW - 0.02))

    def hidden(self, u: Array, v: Array, sleeve: tuple[Array, Array], canvas: "Canvas") -> Bools:
        """What the mask covers before the head is taken out: any garment, and the arms.

        Args:
            u: Canonical coordinates of the mask's pixels.
            v: The same.
            sleeve: The same.
            canvas: An empty one of that size; it is painted on.
        """
        side, (along, across) = np.abs(u), sleeve
        corner, margin = 0.08, 0.07
        across_box = np.maximum(side - (WIDEST + margin - corner), 0)
        middle, reach = (LONGEST - 0.5) / 2, (LONGEST + 0.5) / 2 + margin - corner
        down_box = np.maximum(np.abs(v - middle) - reach, 0)
        box = across_box**2 + down_box**2 < corner**2
        # a stadium round the longest and widest sleeve, rounded at the elbow
        wide = WIDEST_SLEEVE + 0.05
        beyond = np.maximum(along - (LONGEST_SLEEVE + 0.05), 0)
        arm = (across**2 + beyond**2 < wide**2) & (along > 0)
        for name in ("left", "right"):
            elbow, hand = self.joints[f"{name} elbow"], self.joints[f"{name} hand"]
            canvas.capsule(elbow, hand, 0.12 * self.unit, 0.1 * self.unit, 1)
        return box | arm | (canvas.labels > 0)


class Canvas:
    """Labels on a grid of ``factor`` subpixels a pixel, painted over by later shapes."""

    def __init__(self, size: tuple[int, int], factor: int) -> None:
        self.factor = factor
        self.labels: NDArray[np.uint8] = np.zeros([length * factor for length in size], np.uint8)
        rows, columns = axes(size, factor)
        self._rows, self._columns = rows[:, None], columns

    def capsule(
        self, start: Sequence[float], end: Sequence[float], first: float, last: float, label: int
    ) -> None:
        """A line from ``start`` to ``end`` (x, y), as wide as the radii there; all in pixels."""
        most = max(first, last)
        window = tuple(
            slice(
                max(0, math.floor((min(start[axis], end[axis]) - most) * self.factor)),
                max(0, math.ceil((max(start[axis], end[axis]) + most) * self.factor)),
            )
            for axis in (1, 0)
        )
        x, y = self._columns[window[1]] - start[0], self._rows[window[0]] - start[1]
        dx, dy = end[0] - start[0], end[1] - start[1]
        length = max(dx * dx + dy * dy, 1e-6)
        place = (x * (dx / length) + y * (dy / length)).clip(0, 1)
        away = (x - place * dx) ** 2 + (y - place * dy) ** 2
        self.labels[window][away < (first + (last - first) * place) ** 2] = label


def axes(size: tuple[int, int], factor: int = 1) -> tuple[Array, Array]:
    """Centres of the rows and of the columns, in pixels."""
    height, width = (
        (np.arange(length * factor, dtype=np.float32) + 0.5) / factor for length in size
    )
    return height, width


def draw_person(random: np.random.Generator, size: tuple[int, int]) -> Person:
    """Draws a person on a picture of ``size`` (height, width)."""

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(random.random())

    unit = between(56, 74) * size[0] / 128
    turn, shear, aspect = between(-0.2, 0.2), between(-0.1, 0.1), between(0.9, 1.1)
    cos, sin = math.cos(turn), math.sin(turn)
    matrix = (
        (cos * unit * aspect, (cos * shear - sin) * unit),
        (sin * unit * aspect, (sin * shear + cos) * unit),
    )
    centre = (
        size[1] / 2 + between(-0.11, 0.11) * size[1],
        between(0.93, 1.04) * unit + between(-0.01, 0.13) * size[0],
    )
    warp = tuple(
        (between(0, 0.02) * size[0], 2 * math.pi / (between(0.45, 0.8) * size[0]), between(0, 6.3))
        for _ in range(2)
    )
    bend = (between(-3, 1.2), between(-3, 1.2))

    def place(u: float, v: float) -> tuple[float, float]:
        side = max(abs(u) - _BEND, 0)
        return _on_picture(centre, matrix, warp, (u, v + bend[u < 0] * side * side))

    elbow = tuple(SLEEVE_START[axis] + _ELBOW * SLEEVE_AXIS[axis] for axis in (0, 1))
    nod = between(-0.05, 0.05)
    joints = {
        "crown": place(nod, -0.86),
        "head": place(nod, -0.74),
        "nose": place(nod, -0.75),
        "chin": place(nod * 0.8, -0.66),
        "neck": place(0, -0.42),
        "chest": place(0, -0.36),
        "left collar": place(0.13, -0.36),
        "right collar": place(-0.13, -0.36),
    }
    crossing = int(random.random() * 10)  # 0 and 1: that forearm lies across the torso
    for number, (name, sign) in enumerate((("left", 1), ("right", -1))):
        joints[f"{name} shoulder"] = place(sign * 0.22, -0.36)
        x, y = joints[f"{name} elbow"] = place(sign * elbow[0], elbow[1])
        angle = between(-0.15, 0.6) * sign
        toward = place(between(-0.1, 0.1), between(0.05, 0.3))
        if number == crossing:
            angle = math.atan2(toward[0] - x, toward[1] - y)
        dx, dy = math.sin(angle) * unit, math.cos(angle) * unit
        joints[f"{name} wrist"] = (x + 0.33 * dx, y + 0.33 * dy)
        joints[f"{name} hand"] = (x + 0.4 * dx, y + 0.4 * dy)
        hip = joints[f"{name} hip"] = place(sign * 0.12, 0.42)
        stride = sign * between(0.02, 0.16)
        joints[f"{name} knee"] = (hip[0] + stride * unit, hip[1] + 0.9 * unit)

    def pick(tones: Sequence[Colour]) -> Colour:
        red, green, blue = tones[int(random.random() * len(tones))]
        light = between(0.92, 1.04)
        return min(1.0, red * light), min(1.0, green * light), min(1.0, blue * light)

    skin, hair = pick(_SKIN), pick(_HAIR)
    trousers = colorsys.hsv_to_rgb(between(0, 1), between(0.05, 0.55), between(0.1, 0.75))
    shade = between(0.4, 0.9)
    background = colorsys.hsv_to_rgb(between(0, 1), between(0, 0.35), shade)
    drift = between(-0.15, 0.1) if random.random() < 0.6 else 0.0
    direction = between(0, 2 * math.pi)
    return Person(
        centre=centre,
        matrix=matrix,
        warp=(warp[0], warp[1]),
        bend=bend,
        joints=joints,
        unit=unit,
        long_hair=bool(random.random() < 0.45),
        colours={
            BACKGROUND: background,
            HAIR: hair,
            FACE: skin,
            # a little darker, so that the chin shows
            NECK: (skin[0] * 0.92, skin[1] * 0.9, skin[2] * 0.9),
            LEFT_ARM: skin,
            RIGHT_ARM: skin,
            LEFT_LEG: trousers,
            RIGHT_LEG: (trousers[0] * 0.93, trousers[1] * 0.93, trousers[2] * 0.93),
        },
        gradient=((drift, drift, drift), (math.cos(direction), math.sin(direction))),
    )


Warp = Sequence[tuple[float, float, float]]
Matrix = Sequence[tuple[float, float]]


def _canonical(
    centre: tuple[float, float],
    matrix: Matrix,
    warp: Warp,
    bend: tuple[float, float],
    xs: Array,
    ys: Array,
) -> tuple[Array, Array]:
    (xu, xv), (yu, yv) = matrix
    scale = 1 / (xu * yv - xv * yu)
    # rows shift sideways by a function of the row and columns by one of the column, so u and v
    # before the bend are sums of a row's and a column's number
    (size_x, pace_x, phase_x), (size_y, pace_y, phase_y) = warp
    rows, columns = ys.astype(np.float64), xs.astype(np.float64)
    sideways = size_x * np.sin(pace_x * rows + phase_x)
    downwards = size_y * np.sin(pace_y * columns + phase_y)
    rows, columns = rows - centre[1], columns - centre[0]

    def combine(of_x: float, of_y: float) -> Array:
        by_row, by_column = of_x * sideways + of_y * rows, of_x * columns + of_y * downwards
        return by_row.astype(np.float32)[:, None] + by_column.astype(np.float32)

    u, v = combine(yv * scale, -xv * scale), combine(-yu * scale, xu * scale)
    left = np.maximum(u - _BEND, 0)
    right = np.minimum(u + _BEND, 0)
    v -= bend[0] * left * left
    v -= bend[1] * right * right
    return u, v


def _on_picture(
    centre: tuple[float, float], matrix: Matrix, warp: Warp, point: tuple[float, float]
) -> tuple[float, float]:
    """Undoes the affine map, then the warp by fixed-point steps (a contraction by 0.15)."""
    u, v = point
    target_x = matrix[0][0] * u + matrix[0][1] * v + centre[0]
    target_y = matrix[1][0] * u + matrix[1][1] * v + centre[1]
    (size_x, pace_x, phase_x), (size_y, pace_y, phase_y) = warp
    x, y = target_x, target_y
    for _ in range(10):
        x, y = (
            target_x - size_x * math.sin(pace_x * y + phase_x),
            target_y - size_y * math.sin(pace_y * x + phase_y),
        )
    return x, y
