"""The samples of one setting of a run: what was planned, what became of it, every score."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from i2am.evaluation.scores.bootstrap import Floats
from i2am.evaluation.shard import SAMPLE, Reason, Shard
from i2am.evaluation.store import Store

OK, FAILED, MISSING = "ok", "failed", "missing"
"""Status of a sample; a missing one is in no committed shard."""

UNEXPLAINED = Reason("unexplained", "the shard gives no reason")


@dataclass
class Samples:
    """All pairs of one setting in the plan's order.

    Attributes:
        setting: ``paired`` or ``unpaired``.
        ids, persons, garments: Of every pair.
        shards: Numbers of the shards that were committed when reading began.
        n_shards: How many the plan wants.
        status: One of "ok", "failed", "missing" for each pair.
        scores: fp64 ``[pairs]`` by name, NaN where there is none.
        reasons: By id, by name of a score or "sample", why there is none.
    """

    setting: str
    ids: list[str]
    persons: list[str]
    garments: list[str]
    shards: list[int]
    n_shards: int
    status: NDArray[np.str_]
    scores: dict[str, Floats] = field(default_factory=dict)
    reasons: dict[str, dict[str, Reason]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every pair was committed and none failed."""
        return bool((self.status == OK).all())

    def column(self, name: str) -> Floats:
        """The scores under a name; made of NaN when it is new."""
        return self.scores.setdefault(name, np.full(len(self.ids), np.nan))

    def why(self, position: int, name: str) -> Reason:
        """Why a committed sample has no score of a name."""
        reasons = self.reasons.get(self.ids[position], {})
        return reasons.get(name) or reasons.get(SAMPLE) or UNEXPLAINED

    def add(self, shard: Shard) -> None:
        """Take over status, scores and reasons of a shard."""
        index = shard.index.numpy()
        self.status[index] = np.where(shard.status.numpy() == 0, OK, FAILED)
        for name, values in zip(shard.score_names, shard.scores.numpy().T, strict=True):
            self.column(name)[index] = values
        for identity, reasons in shard.reasons.items():
            self.reasons[identity] = dict(reasons)


def read_samples(store: Store, setting: str) -> Samples:
    """The samples of one setting, from the shards that are committed now.

    Shards that other processes commit meanwhile are not looked at.

    Raises:
        StoreError: If a shard is damaged or belongs to another run.
        OSError: If one cannot be read.
    """
    pairs = store.plan["data"]["pairs"][setting]
    ids, persons, garments = ([pair[field] for pair in pairs] for field in range(3))
    samples = Samples(
        setting,
        ids,
        persons,
        garments,
        shards=sorted(store.committed(setting)),
        n_shards=len(store.shard_numbers(setting)),
        status=np.full(len(ids), MISSING),
    )
    for number in samples.shards:
        samples.add(store.read(setting, number, tensors=()))
    return samples
