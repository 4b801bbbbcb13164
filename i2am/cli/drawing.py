"""What ``i2am figure`` does: read runs, draw, write."""

import io
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import i2am
from i2am.attribution.shown import ROWS, Shown, Votes
from i2am.cli.errors import InputRejected
from i2am.cli.recorded import RecordedRun, read_run
from i2am.files import MANIFEST, check_free, fresh_folder, readable_json
from i2am.plots.recorded import FIGURES, ONE_EACH, Recorded, figure, figure_name, lacks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("i2am")

_WHAT = {
    "time_and_head": "Maps of the whole run",
    "time_groups": "R2G per group of denoising steps, the noisiest first",
    "heads": "R2G per head",
    "reference_maps": "G2R over time and per head",
    "specific_reference": "Where on the reference the red patch looked",
    "layers": "Maps per layer",
    "models": "Models side by side",
}
# time and producer would make equal figures different files
_SAVE: dict[str, dict[str, Any]] = {
    "png": {"metadata": {"Software": None}},
    "jpg": {"pil_kwargs": {"quality": 90}},
    "pdf": {"metadata": {"CreationDate": None, "Creator": None, "Producer": None}},
}


@dataclass(frozen=True)
class Drawing:
    """What the command line asked for, see ``i2am figure --help``."""

    runs: tuple[Path, ...]
    which: tuple[str, ...]
    out: Path
    votes: Votes = "uniform"
    weights: Votes = "uniform"
    style: str = "default"
    threshold: float = 0.4
    shared: bool = False
    preset: str | None = None
    guidance_branch: str | None = None
    kind: str = "png"
    dpi: int = 150
    overwrite: bool = False


def draw(drawing: Drawing) -> list[str]:
    """Draw and write figures.

    Returns:
        Names of the picture files.

    Raises:
        InputRejected: A run cannot be read, a figure cannot be made of it, or matplotlib is
            missing; nothing was written.
        OutputRefused: The output folder is in use.
        OSError: The disk failed; nothing was left behind.
    """
    check_free(drawing.out, overwrite=drawing.overwrite)
    runs = [read_run(run, branch=drawing.guidance_branch) for run in drawing.runs]
    with fresh_folder(drawing.out, overwrite=drawing.overwrite) as folder:
        files = []
        try:
            for name, made in _figures(drawing, runs):
                files.append(f"{name}.{drawing.kind}")
                (folder / files[-1]).write_bytes(_bytes(made, drawing))
        except (ValueError, ImportError) as error:
            raise InputRejected(str(error)) from error
        if not files:
            raise InputRejected("no figure can be drawn of what these runs recorded")
        settings = {
            name: value
            for name, value in asdict(drawing).items()
            if name not in ("runs", "out", "overwrite")
        }
        manifest = {
            "i2am": i2am.__version__,
            "command": "figure",
            "settings": settings,
            "runs": [os.path.relpath(run, drawing.out) for run in drawing.runs],
            "files": [*files, MANIFEST],
        }
        (folder / MANIFEST).write_bytes(readable_json(manifest))
    return files


def _figures(drawing: Drawing, runs: Sequence[RecordedRun]) -> "Iterator[tuple[str, Figure]]":
    everything = "all" in drawing.which
    asked = FIGURES if everything else dict.fromkeys(map(figure_name, drawing.which))
    labels = _labels(runs)
    recorded = [
        Recorded(run.maps, run.generated, run.reference, label, run.truths)
        for run, label in zip(runs, labels, strict=True)
    ]
    for which in asked:
        apart = which in ONE_EACH and len(runs) > 1
        groups = [[number] for number in range(len(runs))] if apart else [[*range(len(runs))]]
        for group in groups:
            of = [recorded[number] for number in group]
            reason = lacks(which, of)
            if reason and everything:
                log.info("%s left out, because %s", which, reason)
                continue
            log.info("drawing %s", which)
            name = f"{which}_{group[0] + 1}" if apart else which
            yield name, _figure(which, of, [runs[number] for number in group], drawing)


def _figure(
    which: str, recorded: list[Recorded], runs: list[RecordedRun], drawing: Drawing
) -> "Figure":
    presets = {drawing.preset or run.preset for run in runs}
    if len(presets) > 1:
        raise ValueError("runs were recorded with different presets; choose one with --preset")
    (preset,) = presets
    return figure(
        which,
        recorded,
        votes=drawing.votes,
        weights=drawing.weights,
        style=drawing.style,
        threshold=drawing.threshold,
        shared=drawing.shared and which not in ("time_and_head", "models"),
        preset=preset,
        heading=_heading(which, runs, drawing, preset),
    )


def _heading(which: str, runs: list[RecordedRun], drawing: Drawing, preset: str) -> str:
    what, shown = _WHAT[which], Shown(runs[0].maps, preset)
    if which == "heads":
        what += f", {shown.heads_of}"
    facts: list[str] = []
    # what differs between rows stands beside them
    for of_all in (set(map(_model, runs)), set(map(_guidance, runs))):
        facts += of_all if len(of_all) == 1 else []
    if not all(run.maps.informative for run in runs):
        facts.append("layers with a single reference token, whose maps show no cause")
    if preset != "paper":
        facts.append(f"preset {preset}")
    sentences = [f"{what} ({', '.join(facts)})" if facts else what]
    if which not in ("reference_maps", "specific_reference"):
        sentences.append(shown.r2g_title(drawing.votes))
    if which in ("time_and_head", "reference_maps", "layers", "models"):
        sentences.append(shown.g2r_title(f"{ROWS[drawing.weights]} count"))
    return ". ".join(sentences)


def _labels(runs: Sequence[RecordedRun]) -> list[str]:
    """The first that tells all runs apart: model, guidance, folder; none for a single run."""
    if len(runs) == 1:
        return [""]
    for labels in (
        [_model(run) for run in runs],
        [_guidance(run) for run in runs],
        [run.folder.resolve().name for run in runs],
    ):
        if len(set(labels)) == len(runs):
            return labels
    return [str(run.folder) for run in runs]


def _model(run: RecordedRun) -> str:
    return run.model if run.trained else f"{run.model}, random weights"


def _guidance(run: RecordedRun) -> str:
    if run.guidance <= 1:
        return "no guidance"
    half = run.maps.provenance.get("branch")
    return f"guidance {run.guidance:g}" + (
        ", unconditional half" if half == "unconditional" else ""
    )


def _bytes(made: "Figure", drawing: Drawing) -> bytes:
    buffer = io.BytesIO()
    made.savefig(buffer, format=drawing.kind, dpi=drawing.dpi, **_SAVE[drawing.kind])
    return buffer.getvalue()
