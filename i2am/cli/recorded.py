"""Output folders of ``i2am record``, read again: the files that run.json lists, and no others."""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2am.attribution import AttributionMaps, load_maps
from i2am.cli.errors import InputRejected
from i2am.data.images import ImageRejected, read_bytes, read_image
from i2am.files import MANIFEST, FileRejected, is_listed, read_json, require

if TYPE_CHECKING:
    from PIL.Image import Image

_FIELDS: dict[str, type | list[type]] = {
    "i2am": str,
    "device": str,
    "files": dict,
    "inputs": dict,
    "inputs.reference": dict,
    "notes": [str],
    "image.width": int,
    "image.height": int,
    "model.scheduler": str,
    "model.trained": bool,
    "settings.model": str,
    "settings.guidance": float,
    "settings.guidance_branch": str,
    "settings.steps": int,
    "settings.seed": int,
    "settings.preset": str,
    "settings.dtype": str,
    "settings.regions": list,
}


@dataclass(frozen=True)
class RecordedRun:
    """What a folder holds, as far as pictures need it.

    Attributes:
        folder: Where it lies.
        manifest: Content of its ``run.json``.
        maps: One sample.
        generated: The image that was made.
        reference: The image it was made after.
        truths: Where regions should look, as fractions of the reference, where that is known.
    """

    folder: Path
    manifest: Mapping[str, Any]
    maps: AttributionMaps
    generated: "Image"
    reference: "Image"
    truths: Mapping[str, tuple[float, float]]

    @property
    def model(self) -> str:
        """What the model is called."""
        # a path or a built-in name
        return Path(self.manifest["settings"]["model"]).name

    @property
    def guidance(self) -> float:
        """Scale of guidance."""
        return float(self.manifest["settings"]["guidance"])

    @property
    def steps(self) -> int:
        """Denoising steps."""
        return int(self.manifest["settings"]["steps"])

    @property
    def preset(self) -> str:
        """How maps are read and drawn."""
        return str(self.manifest["settings"]["preset"])

    @property
    def trained(self) -> bool:
        """Whether the weights were."""
        return bool(self.manifest["model"]["trained"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """The ``run.json`` of an output folder of ``i2am record``, with all that is read of it.

    Raises:
        InputRejected: It is no such folder, or its ``run.json`` is damaged.
        OSError: The disk failed.
    """
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
        if not isinstance(manifest, dict) or manifest.get("command") != "record":
            raise InputRejected(
                f"run {folder} must be an output folder of i2am record, its {MANIFEST} is of "
                "another command"
            )
        require(manifest, str(path), _FIELDS)
        for name, entry in manifest["inputs"].items():
            require(entry, f"{path}: inputs.{name}", {"file": str, "sha256": str})
        for name, entry in manifest["files"].items():
            require(entry, f"{path}: files.{name}", {"bytes": int, "sha256": str})
        for region in manifest["settings"]["regions"]:
            require(region, f"{path}: settings.regions", {"name": str})
            if not _is_place(region.get("truth")):
                raise FileRejected(f"{path} is damaged: truth of region {region['name']}")
    except (FileNotFoundError, NotADirectoryError):
        raise InputRejected(
            f"run {folder} must be an output folder of i2am record, it has no {MANIFEST}"
        ) from None
    except FileRejected as error:
        raise InputRejected(str(error)) from error
    return manifest


def halves(manifest: Mapping[str, Any]) -> list[str]:
    """The recorded halves of guidance, the one of the first files first."""
    recorded = manifest["settings"]["guidance_branch"]
    return ["conditional", "unconditional"] if recorded == "both" else [recorded]


def read_run(folder: Path, *, branch: str | None = None) -> RecordedRun:
    """Read an output folder of ``i2am record``; input files are found beside it and checked.

    Args:
        folder: The folder.
        branch: Half of guidance, "conditional" or "unconditional"; None is the first recorded.

    Raises:
        InputRejected: It is no such folder, was damaged, holds no such half or a file of another
            run, or the reference image is not where it was or has changed.
        OSError: The disk failed.
    """
    manifest = read_manifest(folder)
    recorded = halves(manifest)
    if branch is not None and branch not in recorded:
        raise InputRejected(
            f"run {folder} must hold the {branch} half, it holds the {' and '.join(recorded)}"
        )
    # of two halves the second is told apart by its name
    suffix = f"_{branch}" if branch == recorded[-1] and len(recorded) > 1 else ""
    try:
        path = _listed(folder, manifest, f"maps{suffix}.safetensors")
        maps = load_maps(path)
        _check_provenance(maps.provenance, str(path))
        return RecordedRun(
            folder=folder,
            manifest=manifest,
            maps=maps,
            generated=read_image(_listed(folder, manifest, "image.png"), name="generated image"),
            reference=_input(folder, manifest["inputs"]["reference"], "reference"),
            truths={
                region["name"]: tuple(region["truth"])
                for region in manifest["settings"]["regions"]
                if region.get("truth")
            },
        )
    except ValueError as error:
        raise InputRejected(str(error)) from error


def read_scores(folder: Path, manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Content of ``scores.json``: by name a "value" or None, and then the "reason".

    Raises:
        InputRejected: It is missing, damaged, or of another run.
        OSError: The disk failed.
    """
    path = _listed(folder, manifest, "scores.json")
    try:
        scores = read_json(path)
        for name, entry in scores.items():
            undefined = entry["value"] is None
            require(entry, f"{path}: {name}", {"reason": str} if undefined else {"value": float})
        return {name: {key: of[key] for key in ("value", "reason")} for name, of in scores.items()}
    except FileRejected as error:
        raise InputRejected(str(error)) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise InputRejected(f"{path} is damaged: {error!r}") from error


def _check_provenance(provenance: Mapping[str, Any], what: str) -> None:
    """Refuse what the pictures that show it cannot use."""
    if provenance.get("pictures") is not None:
        for which in ("generated", "reference"):
            require(provenance, f"{what}: provenance", {f"pictures.{which}": dict})
            for name, count in (("size", 2), ("box", 4)):
                values = provenance["pictures"][which].get(name, ())
                if values is not None and not _are_numbers(values, count):
                    raise FileRejected(f"{what}: provenance is damaged: pictures.{which}.{name}")
    for name, kind in (("steps", int), ("regions", dict), ("note", str), ("branch", str)):
        if provenance.get(name) is not None:
            require(provenance, f"{what}: provenance", {name: kind})


def _is_place(truth: Any) -> bool:
    """Whether it is None, or fractions of a height and a width."""
    return truth is None or _are_numbers(truth, 2)


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(value, float | int) for value in values)
    )


def _listed(folder: Path, manifest: Mapping[str, Any], name: str) -> Path:
    """A file of a folder, if it is the one that the manifest lists."""
    path = folder / name
    if name not in manifest["files"]:
        raise InputRejected(f"run {folder} must hold {name}, its {MANIFEST} does not list it")
    try:
        same = is_listed(path, manifest["files"][name])
    except FileNotFoundError:
        raise InputRejected(f"run {folder} must hold {name}, it is not there") from None
    except FileRejected as error:
        raise InputRejected(str(error)) from error
    if not same:
        raise InputRejected(
            f"{path} must be the one of run {folder}: it has changed since, or is of another run"
        )
    return path


def _input(folder: Path, entry: Mapping[str, Any], name: str) -> "Image":
    # written as seen from the folder, so that both can be moved together
    path = folder / entry["file"]
    try:
        content = read_bytes(path, name=name)
    except ImageRejected as error:
        raise InputRejected(
            f"{error}; it was an input of run {folder} and is read again: put it back"
        ) from error
    if sha256(content).hexdigest() != entry["sha256"]:
        raise InputRejected(f"{name} {path} must be the one of run {folder}, it has changed since")
    return read_image(path, name=name, content=content)
