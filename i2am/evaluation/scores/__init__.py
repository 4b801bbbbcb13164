"""Scores of a run: attribution and image metrics, from committed shards and pictures alone.

    store = Store.open("runs/pocket")
    scores = score_run(store, Scoring(metrics=("imacs", "ssim")))
    write_results(store.folder, scores)

Every name is imported when it is first used.
"""

from typing import TYPE_CHECKING

from i2am.lazy import lazy

# for type checkers, who cannot follow __getattr__
# ruff: noqa: F401
if TYPE_CHECKING:
    from i2am.evaluation.scores.comparison import Comparison, compare
    from i2am.evaluation.scores.inception import Features
    from i2am.evaluation.scores.protocols import PROTOCOLS, Protocol
    from i2am.evaluation.scores.results import write_results
    from i2am.evaluation.scores.scoring import RunScores, Scoring, score_run

_MODULES = {
    "PROTOCOLS": "protocols",
    "Comparison": "comparison",
    "Features": "inception",
    "Protocol": "protocols",
    "RunScores": "scoring",
    "Scoring": "scoring",
    "compare": "comparison",
    "score_run": "scoring",
    "write_results": "results",
}

__all__ = sorted(_MODULES)

__getattr__, __dir__ = lazy(__name__, _MODULES)
