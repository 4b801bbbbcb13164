"""Means and confidence intervals that do not depend on who computed which sample when."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_CELLS = 4_000_000  # of counts held at once
_TAIL = 2.5  # per cent on each side


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


def mean(values: Floats) -> float:
    """The mean with an exactly rounded sum, so that the order of the values does not matter.

    Args:
        values: fp64 ``[n]``, finite, at least one.
    """
    return math.fsum(values.tolist()) / len(values)


def resamples(n: int, replicates: int, *, seed: int, stream: int = 0) -> Iterator[Floats]:
    """How often each of `n` samples is drawn when `n` are drawn with replacement, again and again.

    Args:
        n: Number of samples, at least 1.
        replicates: Number of resamples.
        seed: Key of the Philox generator.
        stream: Other half of the key: resamples that must not depend on each other differ in it.

    Yields:
        Blocks fp64 ``[some, n]`` whose rows sum to `n`, `replicates` rows altogether.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, stream], np.uint64)))
    rows = max(1, _CELLS // n)
    for start in range(0, replicates, rows):
        block = min(rows, replicates - start)
        drawn = generator.integers(n, size=(block, n)) + n * np.arange(block)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=block * n)
        yield counts.reshape(block, n).astype(np.float64)


def resampled_means(values: Floats, replicates: int, *, seed: int, stream: int = 0) -> Floats:
    """Means ``[replicates]`` of resamples of fp64 ``[n]``."""
    n = len(values)
    blocks = resamples(n, replicates, seed=seed, stream=stream)
    return np.concatenate([block @ values / n for block in blocks])


def interval(replicates: Floats) -> Interval:
    """From the 2.5th to the 97.5th percentile of a statistic's values over resamples ``[n]``."""
    low, high = np.percentile(replicates, [_TAIL, 100 - _TAIL])
    return Interval(float(low), float(high))
