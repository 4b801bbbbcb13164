"""Kernel distance (KID): the squared maximum mean discrepancy of two sets, unbiased, in fp64."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from i2am.evaluation.scores.bootstrap import Floats, resamples

SUBSETS = 100
SUBSET_SIZE = 50
_ROWS = 2048  # of the kernel held at once


class SubsetKernelDistance(NamedTuple):
    """KID as most papers print it."""

    value: float
    """Mean over the subsets."""
    std: float
    """Their standard deviation, over their number."""


def kernel_distance(generated: Tensor, real: Tensor) -> float:
    """The U-statistic over all pairs of pictures: no subsets, no random numbers.

    The kernel is ``(x . y / features + 1)^3``.

    Args:
        generated: ``[n, features]``, any floating dtype, n at least 2.
        real: ``[m, features]``, likewise.

    Raises:
        ValueError: If a set has fewer than two pictures.
    """
    return resampled_kernel_distances(generated, real, 0, seed=0)[0]


def resampled_kernel_distances(
    generated: Tensor, real: Tensor, replicates: int, *, seed: int
) -> tuple[float, Floats]:
    """The U-statistic, and its values for resamples of both sets.

    Pairs of a picture with itself stay left out when it was drawn twice: they would add a distance
    that no set of different pictures has.

    Args:
        generated, real: As for :func:`kernel_distance`.
        replicates: Number of resamples.
        seed: Key of the generator.

    Returns:
        What :func:`kernel_distance` gives, and fp64 ``[replicates]``, less those resamples that
        hold a single picture.

    Raises:
        ValueError: If a set has fewer than two pictures.
    """
    _check(generated, real)
    weights = (
        np.concatenate(
            [np.ones((1, len(side))), *resamples(len(side), replicates, seed=seed, stream=stream)]
        )
        for stream, side in enumerate((generated, real))
    )
    values = _weighted(generated.double(), real.double(), *weights)
    return float(values[0]), values[1:][np.isfinite(values[1:])]


def subset_kernel_distance(
    generated: Tensor,
    real: Tensor,
    *,
    subsets: int = SUBSETS,
    size: int = SUBSET_SIZE,
    seed: int = 0,
) -> SubsetKernelDistance:
    """KID over random subsets, the way it was first published.

    Args:
        generated, real: As for :func:`kernel_distance`.
        subsets: Number of subsets.
        size: Pictures of each set in a subset, drawn without replacement.
        seed: Key of the generator.

    Raises:
        ValueError: If a set has fewer pictures than a subset.
    """
    for name, features in (("generated", generated), ("real", real)):
        if len(features) < size:
            raise ValueError(
                f"{name} pictures must be at least {size}, as many as a subset has, "
                f"got {len(features)}"
            )
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, 0], np.uint64)))
    distances = np.array(
        [
            kernel_distance(
                generated[torch.from_numpy(generator.permutation(len(generated))[:size])],
                real[torch.from_numpy(generator.permutation(len(real))[:size])],
            )
            for _ in range(subsets)
        ]
    )
    return SubsetKernelDistance(float(distances.mean()), float(distances.std()))


def _check(generated: Tensor, real: Tensor) -> None:
    for name, features in (("generated", generated), ("real", real)):
        if len(features) < 2:
            raise ValueError(f"{name} pictures must be at least 2, got {len(features)}")


def _weighted(first: Tensor, second: Tensor, of_first: Floats, of_second: Floats) -> Floats:
    """The statistic ``[r]`` when pictures count as often as rows of ``[r, n]``, ``[r, m]`` say."""
    w, v = torch.from_numpy(of_first), torch.from_numpy(of_second)
    between = _form(first, second, w, v) / (w.sum(1) * v.sum(1))
    return (_within(first, w) + _within(second, v) - 2 * between).numpy()


def _within(features: Tensor, weights: Tensor) -> Tensor:
    itself = (features.square().sum(1) / features.shape[1] + 1) ** 3
    squares = weights.square()
    others = _form(features, features, weights, weights) - squares @ itself
    return others / (weights.sum(1) ** 2 - squares.sum(1))


def _form(first: Tensor, second: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """``sum_ij w_ri k(x_i, y_j) v_rj`` for every row r, a block of the kernel at a time."""
    total = torch.zeros(len(w), dtype=torch.float64)
    for start in range(0, len(first), _ROWS):
        rows = slice(start, start + _ROWS)
        kernel = (first[rows] @ second.T / first.shape[1] + 1) ** 3
        total += ((w[:, rows] @ kernel) * v).sum(1)
    return total
