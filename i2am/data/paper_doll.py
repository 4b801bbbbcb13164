"""Try-on scenes with known correspondence: a paper doll, its T-shirt, and where each pixel is from.

The colour of a garment is a function of canonical garment coordinates, evaluated in the picture
of the person and in the picture of the garment. So the flow between them is exact everywhere.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from i2am.data.paper_doll_garment import Array, Bools, Garment, draw_garment, sleeve_coordinates
from i2am.data.paper_doll_person import GARMENT, PARTS, Canvas, Person, axes, draw_person

SIZE = (128, 96)
"""Height and width of every picture of a scene, in pixels."""
SPLITS = ("train", "test")

__all__ = ["PARTS", "SIZE", "SPLITS", "PaperDolls", "Scenes", "render"]

_FACTOR = 2  # subpixels a pixel, each way
_GARMENT_STREAM, _PERSON_STREAM = 0, 1
_POSE_COLOURS = np.array(
    # background, hair, face, neck, left and right arm, left and right leg
    [
        (0.0, 0.0, 0.0),
        (1.0, 0.3, 0.0),
        (1.0, 0.3, 0.0),
        (0.8, 0.6, 0.0),
        (0.0, 0.6, 1.0),
        (0.6, 0.0, 1.0),
        (0.0, 0.8, 0.0),
        (0.3, 1.0, 0.0),
    ],
    np.float32,
).T.copy()


class Scenes(NamedTuple):
    """A batch of scenes; every tensor is contiguous, fp32 where nothing else is said.

    Attributes:
        image: ``[batch, 3, height, width]`` in [0, 1]: the person wearing the garment.
        garment: The same shape: the garment on plain light ground.
        agnostic: The same shape: ``image`` with the mask painted grey 0.5.
        pose: The same shape, as a render of DensePose: a colour for each part, on torso and upper
            arms canonical coordinates as red (across) and green (down), black ground. It
            belongs to the body: no garment changes it.
        mask: ``[batch, height, width]``, 1 = to generate, 0 = given. Also independent of garments.
        garment_mask: The same shape, 1 = garment, on ``garment``.
        garment_region: The same shape, 1 = pixel of ``image`` that shows the garment.
        flow: ``[batch, 2, height, width]``: where on ``garment`` the content of each pixel of
            ``garment_region`` is, (y, x) as fractions of height and width: pixel i of n has its
            centre at (i + 0.5) / n. NaN elsewhere.
        parts: ``[batch, height, width]`` uint8: labels of ``image``, indices of ``PARTS``.
    """

    image: Tensor
    garment: Tensor
    agnostic: Tensor
    pose: Tensor
    mask: Tensor
    garment_mask: Tensor
    garment_region: Tensor
    flow: Tensor
    parts: Tensor


def render(
    indices: Sequence[int], *, split: str = "train", garments: Sequence[int] | None = None
) -> Scenes:
    """Draws scenes; each depends on its split and index alone, not on the batch.

    Args:
        indices: Which scenes, counted from 0 without an end.
        split: ``"train"`` or ``"test"``: disjoint streams.
        garments: For every scene the index of the scene whose garment is worn instead (unpaired);
            None for the scene's own.

    Returns:
        The scenes in the order of ``indices``.

    Raises:
        ValueError: If the split is unknown, an index is negative or none is given, or ``garments``
            has another length than ``indices``.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    people = [int(index) for index in indices]
    worn = people if garments is None else [int(index) for index in garments]
    if not people:
        raise ValueError("indices must name at least one scene, got none")
    if len(worn) != len(people):
        raise ValueError(
            f"garments must have one index for each scene, got {len(worn)} for {len(people)}"
        )
    for name, numbers in (("indices", people), ("garments", worn)):
        if min(numbers) < 0:
            raise ValueError(f"{name} must not be negative, got {min(numbers)}")
    scenes = [
        _scene(draw_person(_stream(split, index, _PERSON_STREAM), SIZE), garment)
        for index, garment in zip(
            people,
            (draw_garment(_stream(split, index, _GARMENT_STREAM), SIZE) for index in worn),
            strict=True,
        )
    ]
    fields = (np.ascontiguousarray(np.stack(field)) for field in zip(*scenes, strict=True))
    return Scenes(*map(torch.from_numpy, fields))


class PaperDolls(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The first scenes of a split as a dataset: each item has the fields of :class:`Scenes`.

    Args:
        count: How many scenes, at least 1.
        split: ``"train"`` or ``"test"``.

    Raises:
        ValueError: If the count is below 1 or the split unknown.
    """

    def __init__(self, count: int, split: str = "train") -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        self.count, self.split = count, split

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(f"index must be in 0..{self.count - 1}, got {index}")
        scenes = render([index], split=self.split)
        return {name: field[0] for name, field in scenes._asdict().items()}


def _stream(split: str, index: int, stream: int) -> np.random.Generator:
    seed = np.random.SeedSequence((SPLITS.index(split), index, stream))
    return np.random.Generator(np.random.PCG64(seed))


def _scene(person: Person, garment: Garment) -> tuple[NDArray, ...]:
    rows, columns = axes(SIZE, _FACTOR)
    u, v = person.canonical(columns, rows)
    sleeve = sleeve_coordinates(u, v)
    back, front = Canvas(SIZE, _FACTOR), Canvas(SIZE, _FACTOR)
    person.back(back, sleeve, u)
    person.front(front)
    body = np.where(front.labels, front.labels, back.labels)
    palette = np.array([person.colours[label] for label in range(GARMENT)], np.float32).T
    colours = np.stack([channel[body] for channel in palette])
    labels = body.copy()
    covered, arm = garment.covers(u, v, sleeve)
    covered &= front.labels == 0
    _wear(garment, u, v, covered, arm, colours, labels)

    image = _average(colours)
    ground = _average((labels == 0).astype(np.float32))
    rows, columns = axes(SIZE)
    tint, direction = person.gradient
    slope = (columns / SIZE[1] - 0.5) * direction[0] + (rows / SIZE[0] - 0.5)[:, None] * direction[
        1
    ]
    image += np.array(tint, np.float32)[:, None, None] * (slope + 0.5) * ground
    image.clip(0, 1, out=image)

    parts = _majority(labels)
    region = parts >= GARMENT
    u, v = person.canonical(columns, rows)
    sleeve = sleeve_coordinates(u, v)
    head = (front.labels > 0) & (front.labels < 4)
    mask = person.hidden(u, v, sleeve, Canvas(SIZE, 1))
    # a pixel that is a head only in part may show some garment, so it is hidden as well
    mask &= _average(head.astype(np.float32)) < 1
    y, x = garment.on_picture(u, v)
    flow = np.stack([y / SIZE[0], x / SIZE[1]]).astype(np.float32)
    flow[:, ~region] = np.nan

    pose = _POSE_COLOURS[:, _majority(body)]
    shown = person.surface(u, v, sleeve) & (_majority(front.labels) == 0)
    pose[:, shown] = np.stack([0.5 + u[shown] / 1.2, 0.5 + v[shown] / 1.2, 0 * u[shown] + 0.5])
    picture, garment_mask = _flat(garment)
    agnostic = np.where(mask, np.float32(0.5), image)
    return (
        image,
        picture,
        agnostic,
        pose.clip(0, 1),
        mask.astype(np.float32),
        garment_mask,
        region.astype(np.float32),
        flow,
        parts,
    )


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
    part = np.where(arm, np.where(u > 0, np.uint8(GARMENT + 1), np.uint8(GARMENT + 2)), GARMENT)
    texture = garment.colour(u, v)
    if garment.logo is not None:
        logo = garment.logo.covers(u, v)
        part[logo] = GARMENT + 3
        texture[:, logo] = np.array(garment.logo.colour, np.float32)[:, None]
    np.copyto(labels[window], part, where=covered, casting="unsafe")
    np.copyto(colours[:, *window], texture, where=covered)


def _flat(garment: Garment) -> tuple[Array, Array]:
    """The picture of a garment, and its mask."""
    rows, columns = axes(SIZE, _FACTOR)
    u, v = garment.canonical(columns, rows)
    covered, arm = garment.covers(u, v, sleeve_coordinates(u, v))
    colours = np.empty((3, *u.shape), np.float32)
    colours[:] = np.array(garment.ground, np.float32)[:, None, None]
    labels = np.zeros(u.shape, np.uint8)
    _wear(garment, u, v, covered, arm, colours, labels)
    return _average(colours), (_majority(labels) > 0).astype(np.float32)


def _average(grid: Array) -> Array:
    rows = grid[..., 0::2, :] + grid[..., 1::2, :]
    return (rows[..., 0::2] + rows[..., 1::2]) * np.float32(0.25)


def _majority(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The second highest of four subpixels: garment where at least half of a pixel is garment."""
    a, b, c, d = (labels[row::2, column::2] for row in (0, 1) for column in (0, 1))
    low = np.maximum(np.minimum(a, b), np.minimum(c, d))
    high = np.minimum(np.maximum(a, b), np.maximum(c, d))
    return np.maximum(low, high)
