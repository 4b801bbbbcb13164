"""Paper-doll persons: a body under the map from the picture to canonical garment coordinates.

Upper arms go through that map, as sleeves do; everything else is painted at joints. Nothing here
knows which garment is worn.
"""

import colorsys
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from i2am.data.paper_doll_canvas import Canvas
from i2am.data.paper_doll_garment import (
    LONGEST,
    LONGEST_SLEEVE,
    SLEEVE_AXIS,
    SLEEVE_START,
    WIDEST,
    WIDEST_SLEEVE,
)
from i2am.data.paper_doll_logo import Array, Bools, Colour
from i2am.data.paper_doll_map import BodyMap

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

_ELBOW = 0.54  # from the start of the sleeve's axis, in canonical units
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

    map: BodyMap
    joints: dict[str, tuple[float, float]]  # by name, pixels (x, y); also points between joints
    unit: float  # pixels per canonical unit
    long_hair: bool
    colours: dict[int, Colour]  # of the labels below GARMENT
    drift: tuple[float, float, float]  # brightness the background gains, and towards which (x, y)

    def back(self, canvas: Canvas, sleeve: tuple[Array, Array], u: Array) -> None:
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
        arm = (np.abs(across) < 0.062) & (along > 0.1) & (along < _ELBOW)
        canvas.labels[arm & (u > 0)] = LEFT_ARM
        canvas.labels[arm & (u < 0)] = RIGHT_ARM

    def front(self, canvas: Canvas) -> None:
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

    def hidden(self, u: Array, v: Array, sleeve: tuple[Array, Array], canvas: Canvas) -> Bools:
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


def draw_person(random: np.random.Generator, size: tuple[int, int]) -> Person:
    """Draws a person on a picture of ``size`` (height, width)."""

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(random.random())

    unit = between(56, 74) * size[0] / 128
    body = _draw_map(between, unit, size)
    place = body.on_picture
    elbow = tuple(SLEEVE_START[axis] + _ELBOW * SLEEVE_AXIS[axis] for axis in (0, 1))
    nod = between(-0.05, 0.05)
    joints = {
        "crown": place(nod, -0.86),
        "head": place(nod, -0.74),
        "nose": place(nod, -0.75),
        "chin": place(nod * 0.8, -0.66),
        "neck": place(0, -0.42),
        "chest": place(0, -0.36),
        "collar": place(0, -0.4),
        "pelvis": place(0, 0.42),
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
        map=body,
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
        drift=(drift, math.cos(direction), math.sin(direction)),
    )


def _draw_map(
    between: Callable[[float, float], float], unit: float, size: tuple[int, int]
) -> BodyMap:
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
    waves = tuple(
        (between(0, 0.02) * size[0], 2 * math.pi / (between(0.45, 0.8) * size[0]), between(0, 6.3))
        for _ in range(2)
    )
    bend = (between(-3, 1.2), between(-3, 1.2))
    return BodyMap(centre, matrix, (waves[0], waves[1]), bend)
