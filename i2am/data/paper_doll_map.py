"""The smooth map between the picture of a person and canonical garment coordinates."""

import math
from dataclasses import dataclass

import numpy as np

from i2am.data.paper_doll_logo import Array

Wave = tuple[float, float, float]
BEND_FROM = 0.2  # distance from the axis of the body, in canonical units


@dataclass(frozen=True)
class BodyMap:
    """A sinusoidal warp, an affine map, and a bend of each arm, in this order from the picture.

    Attributes:
        centre: Pixel (x, y) of u = v = 0 before the warp.
        matrix: Canonical (u, v) to pixels (x, y), by rows.
        waves: Amplitude in pixels, frequency in radians a pixel, and phase: of the shift of x that
            depends on y, and of the shift of y that depends on x.
        bend: How much the arms of positive and of negative u bend: v grows by this times the
            square of the distance beyond ``BEND_FROM``.
    """

    centre: tuple[float, float]
    matrix: tuple[tuple[float, float], tuple[float, float]]
    waves: tuple[Wave, Wave]
    bend: tuple[float, float]

    def canonical(self, xs: Array, ys: Array) -> tuple[Array, Array]:
        """(u, v) of every pixel, ``[len(ys), len(xs)]``; columns and rows are in pixels."""
        (xu, xv), (yu, yv) = self.matrix
        scale = 1 / (xu * yv - xv * yu)
        # the shift of x depends on y alone and that of y on x alone, so u and v before the bend
        # are sums of a number of the row and one of the column
        (size_x, pace_x, phase_x), (size_y, pace_y, phase_y) = self.waves
        rows, columns = ys.astype(np.float64), xs.astype(np.float64)
        sideways = size_x * np.sin(pace_x * rows + phase_x)
        downwards = size_y * np.sin(pace_y * columns + phase_y)
        rows, columns = rows - self.centre[1], columns - self.centre[0]

        def combine(of_x: float, of_y: float) -> Array:
            by_row, by_column = of_x * sideways + of_y * rows, of_x * columns + of_y * downwards
            return by_row.astype(np.float32)[:, None] + by_column.astype(np.float32)

        u, v = combine(yv * scale, -xv * scale), combine(-yu * scale, xu * scale)
        left = np.maximum(u - BEND_FROM, 0)
        right = np.minimum(u + BEND_FROM, 0)
        v -= self.bend[0] * left * left
        v -= self.bend[1] * right * right
        return u, v

    def on_picture(self, u: float, v: float) -> tuple[float, float]:
        """The pixel (x, y) of one canonical point: the inverse of :meth:`canonical`."""
        beyond = max(abs(u) - BEND_FROM, 0)
        v += self.bend[u < 0] * beyond * beyond
        target_x = self.matrix[0][0] * u + self.matrix[0][1] * v + self.centre[0]
        target_y = self.matrix[1][0] * u + self.matrix[1][1] * v + self.centre[1]
        (size_x, pace_x, phase_x), (size_y, pace_y, phase_y) = self.waves
        x, y = target_x, target_y
        # fixed-point steps: the waves are flat enough for a contraction
        for _ in range(10):
            x, y = (
                target_x - size_x * math.sin(pace_x * y + phase_x),
                target_y - size_y * math.sin(pace_y * x + phase_y),
            )
        return x, y
