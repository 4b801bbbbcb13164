"""One paper-doll scene: a person and a garment, painted on their two pictures, as numpy arrays.

Everything is painted once on 2 x 2 subpixels. Labels reduce to pixels by majority, colours by the
mean; mask, pose and flow are evaluated at the centres of pixels.
"""

import numpy as np
from numpy.typing import NDArray

from i2am.data.paper_doll_canvas import Canvas, average, axes, majority
from i2am.data.paper_doll_garment import Garment, draw_garment, sleeve_coordinates
from i2am.data.paper_doll_logo import Array, Bools
from i2am.data.paper_doll_person import FACE, GARMENT, HAIR, PARTS, Person, draw_person

SIZE = (128, 96)
"""Height and width of every picture of a scene, in pixels."""
SPLITS = ("train", "test")

_FACTOR = 2
_GARMENT_STREAM, _PERSON_STREAM = 0, 1
_LEFT_SLEEVE, _RIGHT_SLEEVE, _LOGO = (
    np.uint8(PARTS.index(name)) for name in ("left sleeve", "right sleeve", "logo")
)
_POSE_COLOURS = np.array(
    [
        (0.0, 0.0, 0.0),  # background
        (1.0, 0.3, 0.0),  # hair
        (1.0, 0.3, 0.0),  # face
        (0.8, 0.6, 0.0),  # neck
        (0.0, 0.6, 1.0),  # left arm
        (0.6, 0.0, 1.0),  # right arm
        (0.0, 0.8, 0.0),  # left leg
        (0.3, 1.0, 0.0),  # right leg
    ],
    np.float32,
).T


def person_of(split: str, index: int) -> Person:
    """The person of a scene."""
    return draw_person(_generator(split, index, _PERSON_STREAM), SIZE)


def garment_of(split: str, index: int) -> Garment:
    """The garment of a scene, from a stream of its own: any person can wear it."""
    return draw_garment(_generator(split, index, _GARMENT_STREAM), SIZE)


def draw_scene(person: Person, garment: Garment) -> dict[str, NDArray]:
    """The fields of `i2am.data.paper_doll.Scenes` for one scene, without the batch axis."""
    rows, columns = axes(SIZE, _FACTOR)
    u, v = person.map.canonical(columns, rows)
    sleeve = sleeve_coordinates(u, v)
    back, front = Canvas(SIZE, _FACTOR), Canvas(SIZE, _FACTOR)
    person.back(back, sleeve, u)
    person.front(front)
    body = np.where(front.labels, front.labels, back.labels)
    palette = np.array([person.colours[label] for label in range(GARMENT)], np.float32).T
    colours, labels = palette.take(body, axis=1), body.copy()
    covered, arm = garment.covers(u, v, sleeve)
    covered &= front.labels == 0
    _wear(garment, u, v, covered, arm, colours, labels)
    parts = majority(labels)
    region = parts >= GARMENT

    image = average(colours)
    ground = average((labels == 0).astype(np.float32))
    rows, columns = axes(SIZE)
    gain, across, down = person.drift
    slope = (columns / SIZE[1] - 0.5) * across + (rows / SIZE[0] - 0.5)[:, None] * down
    image += np.float32(gain) * (slope + 0.5) * ground
    image.clip(0, 1, out=image)

    u, v = person.map.canonical(columns, rows)
    sleeve = sleeve_coordinates(u, v)
    mask = person.hidden(u, v, sleeve, Canvas(SIZE, 1))
    head = (front.labels == HAIR) | (front.labels == FACE)
    # a pixel that is head only in part may show some garment, so it stays hidden
    mask &= average(head.astype(np.float32)) < 1
    flow = np.stack(garment.on_picture(u, v)) / np.array(SIZE, np.float32)[:, None, None]
    flow[:, ~region] = np.nan
    pose = _POSE_COLOURS.take(majority(body), axis=1)
    shown = person.surface(u, v, sleeve) & (majority(front.labels) == 0)
    u, v = u[shown], v[shown]
    pose[:, shown] = np.stack([0.5 + u / 1.2, 0.5 + v / 1.2, np.full_like(u, 0.5)])
    picture, garment_mask = _flat(garment)
    return {
        "image": image,
        "garment": picture,
        "agnostic": np.where(mask, np.float32(0.5), image),
        "pose": pose.clip(0, 1),
        "mask": mask.astype(np.float32),
        "garment_mask": garment_mask,
        "garment_region": region.astype(np.float32),
        "flow": flow,
        "parts": parts,
    }


def _generator(split: str, index: int, stream: int) -> np.random.Generator:
    seed = np.random.SeedSequence((SPLITS.index(split), index, stream))
    return np.random.Generator(np.random.PCG64(seed))


def _flat(garment: Garment) -> tuple[Array, Array]:
    """The picture of a garment, and its mask."""
    rows, columns = axes(SIZE, _FACTOR)
    u, v = garment.canonical(columns, rows)
    covered, arm = garment.covers(u, v, sleeve_coordinates(u, v))
    colours = np.empty((3, *u.shape), np.float32)
    colours[:] = np.array(garment.ground, np.float32)[:, None, None]
    labels = np.zeros(u.shape, np.uint8)
    _wear(garment, u, v, covered, arm, colours, labels)
    return average(colours), (majority(labels) > 0).astype(np.float32)


def _wear(
    garment: Garment,
    u: Array,
    v: Array,
    covered: Bools,
    arm: Bools,
    colours: Array,
    labels: NDArray[np.uint8],
) -> None:
    """Paints the covered part of a garment over colours and labels, in place."""
    rows, columns = (np.flatnonzero(covered.any(axis=axis)) for axis in (1, 0))
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    u, v, covered, arm = u[window], v[window], covered[window], arm[window]
    part = np.where(arm, np.where(u > 0, _LEFT_SLEEVE, _RIGHT_SLEEVE), np.uint8(GARMENT))
    texture = garment.colour(u, v)
    if garment.logo is not None:
        logo = garment.logo.covers(u, v)
        part[logo] = _LOGO
        texture[:, logo] = np.array(garment.logo.colour, np.float32)[:, None]
    np.copyto(labels[window], part, where=covered)
    np.copyto(colours[:, *window], texture, where=covered)
