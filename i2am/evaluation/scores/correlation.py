"""Rank correlation between IMACS and the image metrics: the paper's claim, put to the test."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from i2am.evaluation.scores.bootstrap import Floats
from i2am.evaluation.scores.measure import needs
from i2am.evaluation.scores.samples import Samples

BETTER = {"ssim": "higher", "lpips": "lower", "fid": "lower", "kid_full": "lower"}
"""Image metrics that are correlated with, and which way they get better."""

FEWEST = 3
_EXACT = 8  # up to so many, all orders are tried


class Correlation(NamedTuple):
    """Agreement of one IMACS with one image metric.

    A metric that is better when lower agrees with IMACS if the coefficients are negative.
    """

    over: str
    """``models``, or the name of the one whose samples these are."""
    imacs: str
    imacs_setting: str
    metric: str
    metric_setting: str
    better: str
    n: int
    spearman: float | None
    spearman_p: float | None
    kendall: float | None
    kendall_p: float | None
    reason: str | None
    """One sentence if there are no coefficients."""


def across_models(documents: Sequence[Mapping[str, Any]]) -> list[Correlation]:
    """Correlations of the values of several runs, one for each pair of metrics that a run has.

    Args:
        documents: ``metrics.json`` of each.

    Raises:
        NotComputable: If scipy cannot be imported.
    """
    values = [dict(_values(document)) for document in documents]
    columns = list(dict.fromkeys(key for of in values for key in of))
    found = []
    for imacs_setting, imacs in columns:
        for setting, metric in columns:
            if not imacs.startswith("imacs") or metric not in BETTER:
                continue
            keys = ((imacs_setting, imacs), (setting, metric))
            pairs = [[of.get(key) for key in keys] for of in values]
            x, y = _complete(pairs)
            names = (imacs, imacs_setting, metric, setting, BETTER[metric])
            found.append(Correlation("models", *names, *_coefficients(x, y, "models")))
    return found


def within_model(label: str, samples: Mapping[str, Samples]) -> list[Correlation]:
    """Correlations of the scores of single samples: those of a setting with those of the same.

    Args:
        label: Name of the model.
        samples: By setting.

    Raises:
        NotComputable: If scipy cannot be imported.
    """
    found = []
    for setting, of in samples.items():
        for imacs in of.scores:
            for metric in of.scores:
                if not imacs.startswith("imacs") or metric not in BETTER:
                    continue
                both = ~np.isnan(of.scores[imacs]) & ~np.isnan(of.scores[metric])
                x, y = of.scores[imacs][both], of.scores[metric][both]
                names = (imacs, setting, metric, setting, BETTER[metric])
                found.append(Correlation(label, *names, *_coefficients(x, y, "samples")))
    return found


def _values(document: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], float | None]]:
    for setting, of in document["settings"].items():
        for name, made in of["metrics"].items():
            yield (setting, name), made["value"]


def _complete(pairs: Sequence[Sequence[float | None]]) -> tuple[Floats, Floats]:
    rows = [row for row in pairs if None not in row]
    x, y = np.array(rows, dtype=np.float64).reshape(-1, 2).T
    return x, y


def _coefficients(x: Floats, y: Floats, what: str) -> tuple[Any, ...]:
    """The fields of a Correlation from n on."""
    n = len(x)
    none = (n, None, None, None, None)
    if n < FEWEST:
        return *none, f"a rank correlation needs at least {FEWEST} {what} with both, there are {n}"
    for values in (x, y):
        if (values == values[0]).all():
            return *none, f"all {n} {what} have the same value"
    with needs("the rank correlation", "scipy"):
        from scipy import stats
    spearman, kendall = stats.spearmanr(x, y), stats.kendalltau(x, y)
    p = _exact_p(x, y) if n <= _EXACT else float(spearman.pvalue)
    return n, float(spearman.statistic), p, float(kendall.statistic), float(kendall.pvalue), None


def _exact_p(x: Floats, y: Floats) -> float:
    """Share of all orders of `y` whose Spearman coefficient is at least as far from 0.

    For a handful of models the usual approximation is no approximation.
    """
    from itertools import permutations

    from scipy.stats import rankdata

    first, second = (ranks - ranks.mean() for ranks in (rankdata(x), rankdata(y)))
    orders = np.array(list(permutations(range(len(x)))))
    products = np.abs(second[orders] @ first)
    # equal coefficients may differ by rounding
    return float((products >= abs(first @ second) * (1 - 1e-12)).sum() / math.factorial(len(x)))
