"""The files of one recording: image, maps, pictures, scores and where they come from."""

import logging
import math
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

from PIL.Image import Image

import i2am
from i2am.attribution import AttributionMaps
from i2am.attribution.layers import nonfinite
from i2am.cli.errors import ExitCode
from i2am.cli.pictures import Scene, draw
from i2am.cli.reporting import shown_samples
from i2am.cli.settings import AUTO, FILES, MADE, Inputs, Settings, png
from i2am.files import MANIFEST, digests_of, readable_json
from i2am.metrics import imacs_scores
from i2am.metrics.names import IMACS_NAMES
from i2am.viewer import write_report

log = logging.getLogger("i2am")

REPORT = "report.html"
_PACKAGES = ("torch", "diffusers", "transformers", "numpy", "pillow", "safetensors")


class Entry(TypedDict):
    """One score as JSON values: a number, or null and the reason."""

    value: float | None
    reason: str | None


@dataclass(frozen=True)
class Run:
    """What the model and the recorder gave."""

    image: Image
    maps: dict[str, AttributionMaps]
    trained: bool
    pipeline: str
    scheduler: str
    device: str
    seconds: float


@dataclass(frozen=True)
class Result:
    """A finished recording."""

    out: Path
    files: list[str]
    scores: dict[str, Entry]
    notes: list[str]
    trained: bool
    code: ExitCode

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "out": str(self.out),
            "files": self.files,
            "scores": self.scores,
            "notes": self.notes,
            "trained": self.trained,
        }

    @property
    def lines(self) -> list[str]:
        """What to tell people."""
        pictures = [name for name in self.files if name.endswith(".png")]
        data = [name for name in self.files if name not in (*pictures, REPORT)]
        lines = [
            f"written to {self.out}{os.sep}",
            f"pictures: {', '.join(pictures)}",
            f"data: {', '.join(data)}",
            *([f"to point at: {self.out / REPORT}"] if REPORT in self.files else []),
        ]
        for name, entry in self.scores.items():
            value = entry["reason"] if entry["value"] is None else f"{entry['value']:+.4f}"
            lines.append(f"{name}: {value}")
        return lines


def write(folder: Path, settings: Settings, inputs: Inputs, run: Run) -> Result:
    """Write every file of a result; a half of guidance with NaN in its maps is not drawn or scored.

    With NaN in its pair maps alone there is no page.

    Args:
        folder: An empty folder.
        settings: What was asked for.
        inputs: The images that were given.
        run: What came out.

    Returns:
        The names of the files, and the scores.
    """
    run.image.save(folder / "image.png")
    files = ["image.png"]
    if settings.reference_mask == AUTO and inputs.reference_mask is not None:
        (folder / MADE).write_bytes(png(inputs.reference_mask))
        files.append(MADE)
    scores: dict[str, Entry] = {}
    notes = [] if run.trained else ["the weights are random, not trained"]
    notes += {
        maps.provenance["note"]: None for maps in run.maps.values() if maps.provenance.get("note")
    }
    code = ExitCode.DONE
    for number, (branch, maps) in enumerate(run.maps.items()):
        # of two halves the second is told apart by its name
        suffix = f"_{branch}" if number else ""
        maps.save(folder / f"maps{suffix}.safetensors")
        files.append(f"maps{suffix}.safetensors")
        broken = nonfinite(maps.layer_sums)
        if everywhere := maps.nonfinite():
            code = ExitCode.INCOMPLETE
            lacking = "pictures and scores" if broken else "page"
            notes.append(f"no {lacking} of the {branch} half: NaN or Inf in {everywhere[0]}")
            log.warning("%s", notes[-1])
        if not broken:
            scene = Scene(
                inputs=inputs,
                generated=run.image,
                boxes=settings.regions,
                steps=settings.steps or 0,
                preset=settings.preset,
                caption=_caption(settings, run, branch, informative=maps.informative),
            )
            files += draw(folder, maps, scene, suffix=suffix)
        found = _score(maps, inputs, settings.preset, broken)
        scores |= {f"{name}{suffix}": entry for name, entry in found.items()}
    page = [REPORT] if settings.report and code == ExitCode.DONE else []
    files += [*page, "scores.json"]
    (folder / "scores.json").write_bytes(readable_json(scores))
    manifest = _manifest(settings, inputs, run, notes)
    for name in page:
        # the inputs as they were read, whatever has become of their files
        shown = shown_samples(
            manifest,
            run.maps,
            name=settings.out.resolve().name,
            scores=scores,
            generated=run.image,
            reference=inputs.reference,
            mask=inputs.mask,
            reference_mask=inputs.reference_mask,
        )
        write_report(folder / name, shown, title=settings.out.resolve().name)
    manifest["files"] = digests_of(folder, files)
    (folder / MANIFEST).write_bytes(readable_json(manifest))
    return Result(settings.out, [*files, MANIFEST], scores, notes, run.trained, code)


def _score(
    maps: AttributionMaps, inputs: Inputs, preset: str, broken: list[str]
) -> dict[str, Entry]:
    if broken:
        return {
            name: {"value": None, "reason": f"NaN or Inf in {broken[0]}"} for name in IMACS_NAMES
        }
    scores = imacs_scores(
        maps,
        mask=inputs.mask,
        reference_mask=inputs.reference_mask,
        preset=preset,
        undefined="nan",
    )
    entries: dict[str, Entry] = {}
    for name, (values, reason) in scores.items():
        value = None if values is None else float(values[0])
        if value is not None and math.isnan(value):
            # masks were checked when they were read, so only the map can be at fault
            value, reason = None, "its map is the same everywhere"
        entries[name] = {"value": value, "reason": reason}
    return entries


def _caption(settings: Settings, run: Run, branch: str, *, informative: bool) -> str:
    parts = [Path(settings.model).resolve().name]
    if not run.trained:
        parts.append("random weights")
    parts.append(f"{branch} half of guidance" if (settings.guidance or 0) > 1 else "no guidance")
    if not informative:
        parts.append("layers with a single reference token, whose maps show no cause")
    if settings.preset != "paper":
        parts.append(f"preset {settings.preset}")
    return ", ".join(parts)


def _manifest(settings: Settings, inputs: Inputs, run: Run, notes: list[str]) -> dict[str, Any]:
    paths = {name: getattr(settings, name) for name in FILES}
    if settings.reference_mask == AUTO:
        paths["reference_mask"] = settings.out / MADE
    options = {
        name: value
        for name, value in asdict(settings).items()
        if name not in (*FILES, "out", "overwrite")
    }
    return {
        "i2am": i2am.__version__,
        "command": "record",
        "settings": options,
        "inputs": {
            name: {
                # seen from this folder, so that both can be moved together
                "file": os.path.relpath(path, settings.out),
                "sha256": inputs.sha256[name],
                "width": getattr(inputs, name).width,
                "height": getattr(inputs, name).height,
            }
            for name, path in paths.items()
            if path is not None
        },
        "model": {
            "pipeline": run.pipeline,
            "scheduler": run.scheduler,
            "trained": run.trained,
        },
        "image": {"width": run.image.width, "height": run.image.height},
        "seconds": round(run.seconds, 3),
        "device": run.device,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
        "notes": notes,
    }
