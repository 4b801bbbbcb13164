"""Output folders of ``i2am record``, read again by other commands."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2am.attribution import AttributionMaps, load_maps
from i2am.cli.errors import InputRejected
from i2am.cli.folder import MANIFEST
from i2am.data.images import ImageRejected, read_bytes, read_image

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class RecordedRun:
    """What a folder holds, as far as pictures need it.

    Attributes:
        folder: Where it lies.
        maps: One sample.
        generated: The image that was made.
        reference: The image it was made after.
        model: What the model is called.
        guidance: Scale of guidance.
        steps: Denoising steps.
        preset: How maps are read and drawn.
        trained: Whether the weights were.
        truths: Where regions should look, as fractions of the reference, where that is known.
    """

    folder: Path
    maps: AttributionMaps
    generated: "Image"
    reference: "Image"
    model: str
    guidance: float
    steps: int
    preset: str
    trained: bool
    truths: Mapping[str, tuple[float, float]]


def read_run(folder: Path, *, branch: str | None = None) -> RecordedRun:
    """Read an output folder of ``i2am record``; input files are found beside it and checked.

    Args:
        folder: The folder.
        branch: Half of guidance, "conditional" or "unconditional"; None is the first recorded.

    Raises:
        InputRejected: It is no such folder, was damaged, holds no such half, or the reference image
            is not where it was or has changed.
        OSError: The disk failed.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputRejected(
            f"run {folder} must be an output folder of i2am record, it has no {MANIFEST}"
        ) from None
    except ValueError as error:
        raise InputRejected(f"{path} is damaged: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("command") != "record":
        raise InputRejected(
            f"run {folder} must be an output folder of i2am record, its {MANIFEST} is of another "
            "command"
        )
    try:
        maps = _maps(folder, manifest["settings"], branch)
        return RecordedRun(
            folder=folder,
            maps=maps,
            generated=read_image(folder / "image.png", name="generated image"),
            reference=_input(folder, manifest["inputs"]["reference"], "reference"),
            # a path or a built-in name
            model=Path(str(manifest["settings"]["model"])).name,
            guidance=float(manifest["settings"]["guidance"]),
            steps=int(manifest["settings"]["steps"]),
            preset=str(manifest["settings"]["preset"]),
            trained=bool(manifest["model"]["trained"]),
            truths={
                region["name"]: (float(region["truth"][0]), float(region["truth"][1]))
                for region in manifest["settings"]["regions"]
                if region["truth"]
            },
        )
    except ImageRejected as error:
        raise InputRejected(str(error)) from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputRejected(f"{path} is damaged: {error!r}") from error


def _maps(folder: Path, settings: Mapping[str, Any], branch: str | None) -> AttributionMaps:
    recorded = settings["guidance_branch"]
    halves = ["conditional", "unconditional"] if recorded == "both" else [recorded]
    if branch is not None and branch not in halves:
        raise InputRejected(f"run {folder} must hold the {branch} half, it holds the {recorded}")
    # of two halves the second is told apart by its name
    suffix = f"_{branch}" if branch == halves[-1] and len(halves) > 1 else ""
    path = folder / f"maps{suffix}.safetensors"
    try:
        return load_maps(path)
    except FileNotFoundError:
        raise InputRejected(f"run {folder} must hold {path.name}, it is not there") from None
    except ValueError as error:
        raise InputRejected(str(error)) from error


def _input(folder: Path, entry: Mapping[str, Any], name: str) -> "Image":
    # written as seen from the folder, so that both can be moved together
    path = folder / str(entry["file"])
    try:
        content = read_bytes(path, name=name)
    except ImageRejected as error:
        raise InputRejected(
            f"{error}; it was an input of run {folder} and is read again: put it back"
        ) from error
    if sha256(content).hexdigest() != entry["sha256"]:
        raise InputRejected(f"{name} {path} must be the one of run {folder}, it has changed since")
    return read_image(path, name=name, content=content)
