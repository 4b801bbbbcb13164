"""Time and memory of recording against the size of the attention matrix, and against the batch.

    python benchmarks/scaling_plots.py benchmarks/results/gpu/rows.jsonl docs/scaling.png

Needs matplotlib, the extra ``plots``.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
Points = dict[str, list[tuple[float, float]]]

CALL_WAYS = (
    "attention",
    "beside, given lse",
    "fused",
    "materialised",
    "chunked",
    "flash-colreduce",
)


def draw(result: Mapping[str, Any]) -> "Figure":
    """Four panels; those that the result knows nothing of stay empty."""
    from matplotlib.figure import Figure

    calls = [row for row in result["rows"] if row["level"] == "operator"]
    steps = [row for row in result["rows"] if row["level"] == "step"]
    figure = Figure(figsize=(10, 7), dpi=90, layout="constrained")
    figure.suptitle(result["device"], fontsize=9)
    panels = (
        ("one call: ms", "seqlen_q x seqlen_k", call_points(calls, lambda row: row["p50_ms"])),
        ("one call: MiB held", "seqlen_q x seqlen_k", call_points(calls, _memory)),
        ("one guided UNet step: ms", "samples", step_points(steps)),
        ("one guided SD-1.5-size step: peak GiB", "samples", peak_points(result)),
    )
    for axes, (title, label, points) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for way, line in points.items():
            axes.plot(*zip(*sorted(line), strict=True), label=way, linewidth=1.2, marker=".")
        axes.set_title(title, fontsize=8)
        axes.set_xlabel(label, fontsize=7)
        axes.tick_params(which="both", labelsize=7)
        axes.grid(alpha=0.3)
        if points:
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.legend(fontsize=7)
    return figure


def call_points(rows: list[Row], value: Callable[[Row], float]) -> Points:
    """By way: 8 heads of 40 features in the largest batch, which differ in their lengths alone."""
    points: Points = {}
    batch = max((row["batch"] for row in rows), default=0)
    for row in rows:
        alike = (row["heads"], row["head_dim"], row["batch"]) == (8, 40, batch)
        if row["way"] in CALL_WAYS and alike:
            place = (row["seqlen_q"] * row["seqlen_k"], value(row))
            points.setdefault(row["way"], []).append(place)
    return points


def step_points(rows: list[Row]) -> Points:
    """By size and way: guided steps, the plain one among them."""
    points: Points = {}
    for row in rows:
        if not row["guidance"]:
            continue
        name = f"{row['size']}, {row['way']}"
        points.setdefault(name, []).append((row["batch"], row["p50_ms"]))
        if row["way"] == "beside":
            points.setdefault(f"{row['size']}, plain", []).append((row["batch"], row["plain_ms"]))
    return points


def peak_points(result: Mapping[str, Any]) -> Points:
    """By way."""
    points: Points = {}
    for row in result["budgets"]["peaks"]:
        points.setdefault(row["way"], []).append((row["batch"], row["peak_GiB"]))
    return points


def _memory(row: Row) -> float:
    return max(row["memory_MiB"], 1e-3)  # on a logarithmic axis


if __name__ == "__main__":
    draw(report.read(Path(sys.argv[1]))).savefig(sys.argv[2])
