"""Scatter plots of IMACS against the image metrics."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from i2am.evaluation.scores.correlation import Correlation
from i2am.evaluation.scores.measure import NotComputable
from i2am.evaluation.scores.samples import Samples

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def models_figure(
    documents: Sequence[Mapping[str, Any]], names: Sequence[str], found: Sequence[Correlation]
) -> "Figure":
    """One point per model, one panel per pair of metrics with at least one point.

    Args:
        documents: ``metrics.json`` of each run.
        names: What to call them.
        found: Their correlations.

    Raises:
        NotComputable: If matplotlib cannot be imported.
        ValueError: If there is no pair of metrics.
    """

    def draw(axes: Any, of: Correlation) -> None:
        keys = ((of.imacs_setting, of.imacs), (of.metric_setting, of.metric))
        for document, name in zip(documents, names, strict=True):
            x, y = (_entry_value(document, *key) for key in keys)
            if x is not None and y is not None:
                axes.plot(x, y, "o", label=name)
                axes.annotate(name, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)

    return _panels([of for of in found if of.n], draw)


def samples_figure(
    samples: Sequence[Mapping[str, Samples]], names: Sequence[str], found: Sequence[Correlation]
) -> "Figure":
    """One point per sample, one panel per model and pair of metrics.

    Args:
        samples: Of each run, by setting.
        names: What to call the runs.
        found: Correlations within each of them.

    Raises:
        NotComputable: If matplotlib cannot be imported.
        ValueError: If there is no pair of metrics.
    """
    runs = dict(zip(names, samples, strict=True))

    def draw(axes: Any, of: Correlation) -> None:
        scores = runs[of.over][of.imacs_setting].scores
        x, y = scores[of.imacs], scores[of.metric]
        both = ~np.isnan(x) & ~np.isnan(y)
        # as pixels: thousands of points would make a large file otherwise
        axes.plot(x[both], y[both], ".", markersize=2, alpha=0.5, rasterized=True)

    return _panels([of for of in found if of.n], draw, title=lambda of: f"{of.over}\n")


def to_png(figure: "Figure") -> bytes:
    """The same bytes for the same figure."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    return file.getvalue()


def _panels(found: Sequence[Correlation], draw: Any, title: Any = lambda of: "") -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NotComputable(
            f"plots need matplotlib, which could not be imported ({error}); "
            'install it with: pip install "i2am[plots]"'
        ) from error
    if not found:
        raise ValueError("no two metrics to plot against each other were computed")
    columns = min(4, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(3.2 * columns, 3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    for axes, of in zip(panels, found, strict=False):
        draw(axes, of)
        axes.set_xlabel(f"{of.imacs} ({of.imacs_setting})", fontsize=8)
        axes.set_ylabel(f"{of.metric} ({of.metric_setting}), {of.better} is better", fontsize=8)
        axes.tick_params(labelsize=7)
        rank = "" if of.spearman is None else f"Spearman {of.spearman:.2f}, "
        axes.set_title(f"{title(of)}{rank}n = {of.n}", fontsize=8)
    return figure


def _entry_value(document: Mapping[str, Any], setting: str, name: str) -> float | None:
    metrics = document["settings"].get(setting, {"metrics": {}})["metrics"]
    return metrics[name]["value"] if name in metrics else None
