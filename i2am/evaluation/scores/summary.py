"""What the tables say about one metric in one setting: value, interval, counts, reasons."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from i2am.evaluation.scores.bootstrap import Interval, interval, mean, resampled_means
from i2am.evaluation.scores.samples import FAILED, MISSING, OK, Samples
from i2am.evaluation.shard import Reason

Entry = dict[str, Any]
"""JSON values of one metric in one setting, see :func:`entry`."""

DONE, PARTIAL, UNDEFINED, NOT_COMPUTED = "ok", "partial", "undefined", "not_computed"

PICTURE = "picture"
"""Code of a reason: a picture file could not be used, so a number is missing that could be had."""


def entry(
    samples: Samples,
    n_ok: int,
    reasons: Iterable[Reason],
    *,
    value: float | None = None,
    bounds: Interval | None = None,
    reason: str | None = None,
    interval_reason: str | None = None,
    **more: Any,
) -> Entry:
    """One metric in one setting.

    Args:
        samples: Of the setting.
        n_ok: How many the value is of.
        reasons: Why each committed sample that is not among them has no number.
        value: None if there is none.
        bounds: 95 % confidence interval; None if there is none.
        reason: One sentence if there is no value; by default that of most samples.
        interval_reason: One sentence if there is a value without an interval.
        more: Other fields.

    Returns:
        ``value``, ``interval``, ``status``, ``reason``, ``n_ok``, ``n_expected``, ``n_undefined``,
        ``n_missing``, and under ``undefined`` how many samples have no number by code of the
        reason, each with the first message.
    """
    counts: Counter[str] = Counter()
    messages: dict[str, str] = {}
    for code, message in reasons:
        counts[code] += 1
        messages.setdefault(code, message)
    missing = int((samples.status == MISSING).sum())
    if value is None:
        reason = reason or _commonest(counts, messages)
    incomplete = not samples.complete or counts[PICTURE] > 0
    status = PARTIAL if incomplete else DONE
    if value is None:
        status = NOT_COMPUTED if counts[PICTURE] else UNDEFINED
    return {
        "value": value,
        "interval": None if bounds is None else list(bounds),
        "status": status,
        "reason": reason,
        "interval_reason": None if bounds is not None else interval_reason or reason,
        "n_ok": n_ok,
        "n_expected": len(samples.ids),
        "n_undefined": counts.total(),
        "n_missing": missing,
        "undefined": [
            {"code": code, "n": counts[code], "message": messages[code]} for code in sorted(counts)
        ],
        **more,
    }


def not_computed(samples: Samples, reason: str) -> Entry:
    """The entry of a metric for which something is missing; one sentence says what."""
    return {**entry(samples, 0, (), reason=reason), "status": NOT_COMPUTED}


def mean_entry(samples: Samples, name: str, *, replicates: int, seed: int) -> Entry:
    """The entry of a score that every sample has one of: its mean over those that have it."""
    column = samples.column(name)
    defined = ~np.isnan(column)
    without = np.flatnonzero((samples.status != MISSING) & ~defined)
    reasons = [samples.why(int(position), name) for position in without]
    values = column[defined]
    if not len(values):
        return entry(samples, 0, reasons)
    bounds, why = None, no_interval(replicates, len(values))
    if why is None:
        bounds = interval(resampled_means(values, replicates, seed=seed))
    return entry(
        samples, len(values), reasons, value=mean(values), bounds=bounds, interval_reason=why
    )


def no_interval(replicates: int, *sizes: int) -> str | None:
    """Why there is no bootstrap over sets of these sizes; None if there is one."""
    if not replicates:
        return "no bootstrap was asked for"
    if min(sizes) < 2:
        return f"a confidence interval needs at least 2 samples, there is {min(sizes)}"
    return None


def counts(samples: Samples) -> dict[str, Any]:
    """How far a setting is."""
    return {
        "n_expected": len(samples.ids),
        "n_ok": int((samples.status == OK).sum()),
        "n_failed": int((samples.status == FAILED).sum()),
        "n_missing": int((samples.status == MISSING).sum()),
        "shards_committed": len(samples.shards),
        "shards_expected": samples.n_shards,
    }


def to_json(document: Mapping[str, Any]) -> str:
    """Strict JSON, indented.

    Raises:
        ValueError: If a number is NaN or infinite.
    """
    return json.dumps(document, indent=2, sort_keys=True, allow_nan=False)


def _commonest(counts: Counter[str], messages: Mapping[str, str]) -> str:
    if not counts:
        return "no sample is committed"
    code = min(counts, key=lambda code: (-counts[code], code))
    return messages[code]
