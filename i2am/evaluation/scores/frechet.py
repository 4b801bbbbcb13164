"""Frechet distance (FID) of two sets of features, from sums that are added up shard by shard.

FID is the squared distance between the means plus ``tr(S1 + S2 - 2 (S1 S2)^(1/2))``. With factors
``S = L L^T`` the last trace is the nuclear norm of ``L1^T L2``, which stays accurate when there are
fewer pictures than features and both covariances are singular, as for VITON-HD.
"""

from functools import cached_property

import torch
from torch import Tensor


class Moments:
    """Number, sum and sum of outer products of the features of one set, in fp64.

    Its size does not depend on the number of pictures. Features are moved by those of the first
    picture before they are squared, so that little cancels.
    """

    def __init__(self) -> None:
        self.n = 0
        self._origin = self._total = self._outer = torch.empty(0, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Add pictures.

        Args:
            features: ``[pictures, features]``, any floating dtype; may be empty.
        """
        if not len(features):
            return
        features = features.double()
        if not self.n:
            self._origin = features[0].clone()
            self._total = torch.zeros_like(self._origin)
            self._outer = torch.zeros(len(self._origin), len(self._origin), dtype=torch.float64)
        moved = features - self._origin
        self._total += moved.sum(0)
        self._outer.addmm_(moved.T, moved)
        self.n += len(features)

    @property
    def mean(self) -> Tensor:
        """fp64 ``[features]``."""
        return self._origin + self._total / self.n

    @cached_property
    def covariance(self) -> Tensor:
        """fp64 ``[features, features]``, divided by the number of pictures less one."""
        centre = self._total / self.n
        return (self._outer - self.n * torch.outer(centre, centre)) / (self.n - 1)

    @cached_property
    def factor(self) -> Tensor:
        """fp64 ``[features, rank]``, times its transpose the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        # what is not zero only by rounding would come back as its much larger square root
        floor = len(values) * torch.finfo(torch.float64).eps * values[-1].clamp_min(0)
        kept = values > floor
        return vectors[:, kept] * values[kept].sqrt()


class FrechetDistance:
    """The distance between two sets, and what single pictures contribute to it.

    Args:
        generated: Moments of the generated pictures, at least two.
        real: Moments of the real ones, likewise.

    Raises:
        ValueError: If a set has fewer than two pictures.
    """

    def __init__(self, generated: Moments, real: Moments) -> None:
        for name, moments in (("generated", generated), ("real", real)):
            if moments.n < 2:
                raise ValueError(f"{name} pictures must be at least 2, got {moments.n}")
        self._sets = (generated, real)
        left, self._singular, right = torch.linalg.svd(
            generated.factor.T @ real.factor, full_matrices=False
        )
        self._sides = (right.mH, left)
        difference = generated.mean - real.mean
        traces = generated.covariance.trace() + real.covariance.trace()
        distance = difference.square().sum() + traces - 2 * self._singular.sum()
        # the exact value is never negative
        self.value = max(0.0, float(distance))

    def influence(self, features: Tensor, *, of: int) -> Tensor:
        """How fast the distance changes with the weight of each picture of one set.

        The distance of resampled sets is, to first order, this distance plus the resampled mean of
        these numbers: its bootstrap without a matrix root per resample, and without the bias that
        repeated pictures bring to a covariance.

        Args:
            features: ``[pictures, features]`` of that set.
            of: 0 for the generated set, 1 for the real one.

        Returns:
            fp64 ``[pictures]``, of mean 0 over the whole set.
        """
        own, other = self._sets[of], self._sets[1 - of]
        centred = features.double() - own.mean
        shift = 2 * centred @ (own.mean - other.mean)
        spread = centred.square().sum(1)
        # tr (S1 S2)^(1/2) changes with S1 as half of L2 V D^-1 V^T L2^T, D the singular values
        singular = self._singular
        floor = max(len(singular), 1) * torch.finfo(torch.float64).eps
        kept = singular > floor * singular[:1].sum()
        directions = other.factor @ self._sides[of][:, kept] * singular[kept].rsqrt()
        overlap = (centred @ directions).square().sum(1)
        unbiased = own.n / (own.n - 1)
        whole = own.covariance.trace() - singular[kept].sum()
        return shift + unbiased * (spread - overlap) - whole
