"""Label pictures with subpixels: shapes are painted over each other, then reduced to pixels."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from i2am.data.paper_doll_logo import Array


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


def average(grid: Array) -> Array:
    """Mean of 2 x 2 subpixels: ``[..., 2 height, 2 width]`` to ``[..., height, width]``."""
    rows = grid[..., 0::2, :] + grid[..., 1::2, :]
    return (rows[..., 0::2] + rows[..., 1::2]) * np.float32(0.25)


def majority(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The second highest of four subpixels: garment where at least half of a pixel is garment."""
    a, b, c, d = (labels[row::2, column::2] for row in (0, 1) for column in (0, 1))
    low = np.maximum(np.minimum(a, b), np.minimum(c, d))
    high = np.minimum(np.maximum(a, b), np.maximum(c, d))
    return np.maximum(low, high)
