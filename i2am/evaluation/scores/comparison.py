"""Several runs beside each other: one table, the rank correlations, their plots."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2am.evaluation.scores.correlation import Correlation, across_models, within_model
from i2am.evaluation.scores.figure import models_figure, samples_figure, to_png
from i2am.evaluation.scores.measure import NotComputable
from i2am.evaluation.scores.results import to_csv
from i2am.evaluation.scores.scoring import RunScores
from i2am.evaluation.scores.summary import to_json
from i2am.files import make_folder, write_together

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = ("value", "low", "high", "std", "n_ok", "n_expected", "n_undefined", "n_missing")


@dataclass
class Comparison:
    """What concerns all runs.

    Attributes:
        names: Of the runs.
        scored: Their scores.
        models: Correlations across them; empty for a single run.
        samples: Correlations over the samples within each.
        obstacles: What could not be computed or drawn, a sentence each.
    """

    names: list[str]
    scored: Sequence[RunScores]
    models: list[Correlation] = field(default_factory=list)
    samples: list[Correlation] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)

    @property
    def correlations(self) -> list[Correlation]:
        """All of them."""
        return [*self.models, *self.samples]

    @property
    def document(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "runs": [
                {"name": name, **scores.document}
                for name, scores in zip(self.names, self.scored, strict=True)
            ],
            "correlations": [of._asdict() for of in self.correlations],
        }

    def write(self, folder: Path) -> None:
        """Write models.csv, correlation.csv, comparison.json, models.png and samples.png.

        A plot for which something is missing is left out, with a sentence in `obstacles`.

        Raises:
            OSError: If they cannot be written; earlier ones are as they were then.
        """
        contents = {
            "models.csv": self._models_csv().encode(),
            "correlation.csv": to_csv(Correlation._fields, self.correlations).encode(),
            "comparison.json": f"{to_json(self.document)}\n".encode(),
        }
        documents = [scores.document for scores in self.scored]
        samples = [scores.samples for scores in self.scored]
        plots: dict[str, tuple[list[Correlation], Callable[[], Figure]]] = {
            "models.png": (
                self.models,
                lambda: models_figure(documents, self.names, self.models),
            ),
            "samples.png": (
                self.samples,
                lambda: samples_figure(samples, self.names, self.samples),
            ),
        }
        for name, (found, draw) in plots.items():
            if not any(of.n for of in found):
                continue
            try:
                contents[name] = to_png(draw())
            except NotComputable as error:
                if str(error) not in self.obstacles:
                    self.obstacles.append(str(error))
        make_folder(folder)
        write_together(folder, contents)

    def _models_csv(self) -> str:
        rows = [
            [
                name,
                scores.document["protocol"]["name"],
                setting,
                metric,
                *self._cells(made),
                made["status"],
                made["reason"],
            ]
            for name, scores in zip(self.names, self.scored, strict=True)
            for setting, of in scores.document["settings"].items()
            for metric, made in of["metrics"].items()
        ]
        header = ["model", "protocol", "setting", "metric", *_COLUMNS, "status", "reason"]
        return to_csv(header, rows)

    @staticmethod
    def _cells(made: dict[str, Any]) -> list[Any]:
        low, high = made["interval"] or (None, None)
        return [{**made, "low": low, "high": high}.get(name) for name in _COLUMNS]


def compare(scored: Sequence[RunScores], names: list[str]) -> Comparison:
    """Correlate IMACS with the image metrics, across runs and within each.

    Args:
        scored: Scores of each run, one for each model.
        names: What to call them.
    """
    comparison = Comparison(names, scored)
    try:
        if len(scored) > 1:
            comparison.models = across_models([scores.document for scores in scored])
        for name, scores in zip(names, scored, strict=True):
            comparison.samples += within_model(name, scores.samples)
    except NotComputable as error:
        comparison.obstacles.append(str(error))
    return comparison
