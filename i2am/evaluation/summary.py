"""How far a run is: what is committed, what failed, what is missing."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from i2am.evaluation.shard import SAMPLE, Reason
from i2am.evaluation.store import Store


@dataclass(frozen=True)
class Summary:
    """One setting of a run.

    Attributes:
        samples: How many the plan wants.
        ok: How many of these are committed and did not fail.
        failed: Why each failed sample did, by its id.
        undefined: By score and reason, in how many samples that did not fail it is NaN.
        shards: How many the plan wants.
        missing: Numbers of those not committed, as first and last of each unbroken sequence.
        damaged: One sentence for each of these that is there, but truncated or damaged.
    """

    samples: int
    ok: int
    failed: dict[str, Reason]
    undefined: dict[str, dict[Reason, int]]
    shards: int
    missing: list[tuple[int, int]]
    damaged: list[str]

    @property
    def committed(self) -> int:
        """How many samples are committed, failed ones included."""
        return self.ok + len(self.failed)

    @property
    def complete(self) -> bool:
        """Whether every sample is committed and none failed."""
        return self.ok == self.samples

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "samples": self.samples,
            "committed": self.committed,
            "ok": self.ok,
            "failed": {id: reason._asdict() for id, reason in self.failed.items()},
            "undefined": {
                score: [{**reason._asdict(), "n": n} for reason, n in reasons.items()]
                for score, reasons in self.undefined.items()
            },
            "shards": self.shards,
            "missing": self.missing,
            "damaged": self.damaged,
        }


def summarize(store: Store) -> dict[str, Summary]:
    """Counts what is committed, in a snapshot of the run; others may go on writing to it.

    Args:
        store: An open run.

    Returns:
        By setting, in the plan's order.

    Raises:
        StoreConflict: If a shard belongs to another run, or to another version of i2am.
        StoreDamaged: If the scores of one are damaged.
        OSError: If one cannot be read.
    """
    damaged = store.check_headers()
    return {
        setting: _summary(store, setting, damaged[setting].values()) for setting in store.settings()
    }


def _summary(store: Store, setting: str, damaged: Iterable[str]) -> Summary:
    ok, failed = 0, {}
    undefined: dict[str, Counter[Reason]] = {}
    present = set()
    for shard in store.shards(setting):
        present.add(shard.number)
        for id in shard.ids:
            reasons = shard.reasons.get(id, {})
            if SAMPLE in reasons:
                failed[id] = reasons[SAMPLE]
                continue
            ok += 1
            for score, reason in reasons.items():
                undefined.setdefault(score, Counter())[reason] += 1
    numbers = store.shard_numbers(setting)
    return Summary(
        samples=len(store.ids(setting)),
        ok=ok,
        failed=failed,
        undefined={score: dict(sorted(undefined[score].items())) for score in sorted(undefined)},
        shards=len(numbers),
        missing=_sequences(sorted({*numbers} - present)),
        damaged=[*damaged],
    )


def _sequences(numbers: list[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
