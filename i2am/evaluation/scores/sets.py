"""FID and KID of one setting, fed with the features of one shard after the other."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from i2am.evaluation.scores.bootstrap import interval, resampled_means
from i2am.evaluation.scores.frechet import FrechetDistance, Moments
from i2am.evaluation.scores.kernel import (
    SUBSET_SIZE,
    SUBSETS,
    resampled_kernel_distances,
    subset_kernel_distance,
)
from i2am.evaluation.scores.samples import MISSING, Samples
from i2am.evaluation.scores.summary import Entry, entry, no_interval
from i2am.evaluation.shard import Reason

KEPT = 10_000
"""Pictures of each side whose features are kept; of more than that KID is of a random choice."""

KID_NAMES = ("kid_full", "kid_subset50")


class FeatureSet:
    """Features of the pictures of one side.

    Args:
        planned: Pictures that there can be.
        kept: How many of them to keep the features of; the others only enter the moments.
    """

    def __init__(self, planned: int, kept: int = KEPT) -> None:
        self.moments = Moments()
        self._kept: list[Tensor] = []
        self._chosen = None
        if planned > kept:
            generator = np.random.Generator(np.random.Philox(key=np.array([0, 0], np.uint64)))
            self._chosen = frozenset(generator.permutation(planned)[:kept].tolist())

    def add(self, features: Tensor, positions: Sequence[int]) -> None:
        """Add pictures.

        Args:
            features: fp32 ``[pictures, features]``.
            positions: Of each among the planned ones.
        """
        self.moments.add(features)
        if self._chosen is not None:
            chosen = [row for row, at in enumerate(positions) if at in self._chosen]
            features = features[chosen]
        if len(features):
            self._kept.append(features)

    @property
    def features(self) -> Tensor:
        """Those that were kept, fp32 ``[pictures, features]``."""
        return torch.cat(self._kept) if self._kept else torch.empty(0, 0)


class SetScores:
    """Both sides of one setting; persons who are in several pairs count once among the real ones.

    Args:
        samples: Of the setting.
        kept: As for :class:`FeatureSet`.
    """

    def __init__(self, samples: Samples, kept: int = KEPT) -> None:
        self._samples = samples
        self._generated = FeatureSet(len(samples.ids), kept)
        self._real = FeatureSet(len(samples.ids), kept)
        self._persons: set[str] = set()
        self._reasons: dict[int, Reason] = {}

    def add(self, positions: Sequence[int], generated: Tensor, real: Tensor) -> None:
        """Add the pictures of samples.

        Args:
            positions: Of the samples in the plan.
            generated, real: fp32 ``[samples, features]``, NaN for samples that have none.
        """
        defined = ~generated.isnan().any(1) & ~real.isnan().any(1)
        rows = defined.nonzero().flatten().tolist()
        self._generated.add(generated[rows], [positions[row] for row in rows])
        fresh = []
        for row in rows:
            person = self._samples.persons[positions[row]]
            if person not in self._persons:
                self._persons.add(person)
                fresh.append(row)
        self._real.add(real[fresh], [positions[row] for row in fresh])

    def explain(self, position: int, reason: Reason) -> None:
        """Say why a sample that did not fail has no features."""
        self._reasons[position] = reason

    def entries(self, metrics: Sequence[str], *, replicates: int, seed: int) -> dict[str, Entry]:
        """The entries of ``fid`` and ``kid``, those that are asked for.

        Args:
            metrics: ``fid``, ``kid`` or both.
            replicates: Resamples of the intervals; 0 for none.
            seed: Key of the generators.
        """
        made: dict[str, Entry] = {}
        if "fid" in metrics:
            made["fid"] = self._fid(replicates, seed)
        if "kid" in metrics:
            made |= self._kid(replicates, seed)
        return made

    def _fid(self, replicates: int, seed: int) -> Entry:
        sides = (self._generated, self._real)
        try:
            distance = FrechetDistance(*(side.moments for side in sides))
        except ValueError as error:
            return self._entry(reason=f"FID needs two sets: {error}")
        why, bounds = no_interval(replicates, *(side.moments.n for side in sides)), None
        if why is None:
            values = np.full(replicates, distance.value)
            for number, side in enumerate(sides):
                influence = distance.influence(side.features, of=number).numpy()
                # those kept stand for all, whose mean varies less
                scale = (len(influence) / side.moments.n) ** 0.5
                values += scale * resampled_means(influence, replicates, seed=seed, stream=number)
            bounds = interval(values.clip(min=0))
        return self._entry(value=distance.value, bounds=bounds, interval_reason=why)

    def _kid(self, replicates: int, seed: int) -> dict[str, Entry]:
        generated, real = self._generated.features, self._real.features
        sizes = {"n_used": min(len(generated), len(real))}
        try:
            value, replicated = resampled_kernel_distances(generated, real, replicates, seed=seed)
        except ValueError as error:
            full = self._entry(reason=f"KID needs two sets: {error}", **sizes)
        else:
            why = no_interval(replicates, len(generated), len(real))
            bounds = interval(replicated) if why is None else None
            full = self._entry(value=value, bounds=bounds, interval_reason=why, **sizes)
        sizes = {"subsets": SUBSETS, "subset_size": SUBSET_SIZE}
        try:
            distance = subset_kernel_distance(generated, real, seed=seed)
        except ValueError as error:
            subset = self._entry(reason=f"KID over subsets: {error}", std=None, **sizes)
        else:
            why = "its standard deviation over the subsets stands in for it"
            subset = self._entry(
                value=distance.value, std=distance.std, interval_reason=why, **sizes
            )
        made = dict(zip(KID_NAMES, (full, subset), strict=True))
        return made | {f"{name}_x1000": _thousandfold(made[name]) for name in KID_NAMES}

    def _entry(self, **fields: object) -> Entry:
        samples, n_ok = self._samples, self._generated.moments.n
        committed = np.flatnonzero(samples.status != MISSING).tolist()
        failed = [at for at in committed if samples.status[at] != "ok"]
        reasons = [*self._reasons.values(), *(samples.why(at, "features") for at in failed)]
        return entry(samples, n_ok, reasons, n_real=self._real.moments.n, **fields)  # type: ignore[arg-type]


def _thousandfold(made: Entry) -> Entry:
    def scaled(value: float | None) -> float | None:
        return None if value is None else 1000 * value

    bounds = made["interval"]
    times = {"value": scaled(made["value"]), "interval": bounds and [1000 * x for x in bounds]}
    if "std" in made:
        times["std"] = scaled(made["std"])
    return made | times
