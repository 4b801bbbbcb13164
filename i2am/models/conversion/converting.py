"""From a published checkpoint file to a folder in diffusers layout."""

import errno
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from tqdm.auto import tqdm

import i2am
from i2am.files import MANIFEST, digests_of, fresh_folder, readable_json, sha256_of_file
from i2am.models.base import ReferencePipeline
from i2am.models.conversion.describing import empty_pipeline
from i2am.models.conversion.reading import read_checkpoint
from i2am.models.conversion.rules import SYSTEMS, component_of, unwrapped
from i2am.models.conversion.writing import (
    DTYPES,
    Entry,
    Progress,
    write_safetensors,
)
from i2am.models.weights import check_keys, some_of

AVERAGED = "model_ema."
"""How the names of averaged weights begin, which latent diffusion keeps beside the trained ones."""


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Args:
        folder: The new folder.
        pipeline: Name of the pipeline's class.
        sources: Name, size in "bytes" and "sha256" of the "checkpoint", and of the "vae".
        dropped: Names of tensors that were left out.
        files: Size and hash of every weight file, by its path in the folder.
    """

    folder: Path
    pipeline: str
    sources: Mapping[str, Mapping[str, Any]]
    dropped: tuple[str, ...]
    files: Mapping[str, Mapping[str, Any]]


@dataclass
class _Plan:
    entries: dict[str, dict[str, Entry]] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrapped: list[str] = field(default_factory=list)


def convert(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    system: str,
    vae: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    drop: Iterable[str] = (),
    overwrite: bool = False,
    progress: bool = False,
) -> Conversion:
    """Converts a published checkpoint into a folder that `load_pipeline` reads.

    All names and shapes are checked before anything is written. Weights then go from file to file
    one tensor at a time, and the folder appears when it is whole. It holds a ``run.json`` with the
    hashes of what was read and written.

    Args:
        checkpoint: Torch checkpoint or safetensors file in its authors' naming, with or without
            what torch.compile, data parallelism or FSDP add to the names.
        folder: Folder to make.
        system: "paint-by-example", "dci-vton", "stableviton" or "custom".
        vae: A file of an autoencoder alone, in latent diffusion's naming, to take in place of the
            checkpoint's own.
        dtype: Floating dtype to write; None keeps that of each tensor.
        drop: Beginnings of names to leave out, beside what is known to be no weight.
        overwrite: Whether an earlier result in the folder may be replaced.
        progress: Show a progress bar on stderr.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: `system` or `dtype` is unknown; a file is damaged or refused, see
            `read_checkpoint`; tensors are missing, unexpected or misshapen, or their sizes make no
            network; weights are NaN, infinite or beyond the range of `dtype`.
        OutputRefused: The folder holds something, or cannot be made.
        OSError: It cannot be written, or there is too little room. Nothing is left of it then.
    """
    if system not in SYSTEMS:
        raise ValueError(f"system must be one of {', '.join(SYSTEMS)}, got {system!r}")
    if dtype is not None and dtype not in DTYPES:
        names = ", ".join(str(known) for known in DTYPES)
        raise ValueError(f"dtype must be one of {names}, got {dtype}")
    folder = Path(folder)
    sources = {"checkpoint": Path(checkpoint)} | ({} if vae is None else {"vae": Path(vae)})
    with fresh_folder(folder, overwrite=overwrite) as partial:
        plan = _read(sources, system, dtype, tuple(drop))
        pipeline = _check(plan, system, f"{system} checkpoint {os.fspath(checkpoint)}")
        read = sum(path.stat().st_size for path in sources.values())
        written = sum(entry.size for part in plan.entries.values() for entry in part.values())
        _check_room(partial, written)
        with tqdm(
            total=read + written, unit="B", unit_scale=True, desc=system, disable=not progress
        ) as bar:
            hashes = {
                name: {
                    "name": path.name,
                    "bytes": path.stat().st_size,
                    "sha256": sha256_of_file(path, progress=bar.update),
                }
                for name, path in sources.items()
            }
            files = _write(pipeline, plan, partial, bar.update)
        result = Conversion(
            folder, type(pipeline).__name__, hashes, tuple(sorted(plan.dropped)), files
        )
        _write_manifest(partial, system, result)
    return result


def _read(
    sources: Mapping[str, Path], system: str, dtype: torch.dtype | None, drop: tuple[str, ...]
) -> _Plan:
    """Every tensor's way, nothing checked but that it has one."""
    plan = _Plan()
    for name, path in sources.items():
        for key, tensor in read_checkpoint(path).items():
            targets = component_of("vae" if name == "vae" else system, key)
            replaced = name == "checkpoint" and "vae" in sources
            if unwrapped(key) != key:
                plan.wrapped.append(key)
            if key.startswith(drop) or unwrapped(key).startswith(drop) or targets == ():
                plan.dropped.append(key)
            elif targets is None:
                plan.unexpected.append(key)
            elif replaced and targets[0].component == "vae":
                plan.dropped.append(key)
            else:
                for target in targets:
                    part = plan.entries.setdefault(target.component, {})
                    if target.key in part:
                        plan.unexpected.append(f"{key} (a second {target.key})")
                    part[target.key] = Entry(target, tensor, dtype or tensor.dtype)
    return plan


def _check(plan: _Plan, system: str, what: str) -> ReferencePipeline:
    """The pipeline that the tensors belong to, if each has its place, its shape and its kind."""
    averaged = [key for key in plan.unexpected if unwrapped(key).startswith(AVERAGED)]
    if averaged:
        raise ValueError(
            f"the {what} holds {len(averaged)} averaged weights beside or in place of the trained "
            f"ones, such as {averaged[0]}; drop=[{AVERAGED!r}] (--drop {AVERAGED} on the command "
            "line) leaves them out"
        )
    if plan.wrapped:
        what += f", whose names are read without what wrappers add ({some_of(plan.wrapped, 1)}),"
    shapes = {
        component: {key: entry.shape for key, entry in part.items()}
        for component, part in plan.entries.items()
    }
    pipeline = empty_pipeline(system, shapes)
    missing, unexpected, misshapen = [], list(plan.unexpected), []
    for component, module in _modules(pipeline).items():
        wanted = module.state_dict()
        found = plan.entries.get(component, {})
        missing += [f"{component}.{key}" for key in wanted if key not in found]
        unexpected += [f"{component}.{key}" for key in found if key not in wanted]
        misshapen += [
            f"{component}.{key} ({_words(found[key])} for {list(wanted[key].shape)})"
            for key in wanted
            if key in found and not _fits(found[key], wanted[key])
        ]
    check_keys(what, missing=missing, unexpected=unexpected, misshapen=misshapen)
    return pipeline


def _fits(entry: Entry, wanted: Tensor) -> bool:
    rows = entry.source.shape[:1]
    divided = entry.target.parts == 1 or (bool(rows) and rows[0] % entry.target.parts == 0)
    return divided and entry.shape == tuple(wanted.shape) and entry.source.dtype in DTYPES


def _words(entry: Entry) -> str:
    dtype = "" if entry.source.dtype in DTYPES else f"{entry.source.dtype} "
    parts = f" in {entry.target.parts} parts" if entry.target.parts > 1 else ""
    return f"{dtype}{list(entry.source.shape)}{parts}"


def _modules(pipeline: ReferencePipeline) -> dict[str, nn.Module]:
    return {
        name: component
        for name, component in pipeline.components.items()
        if isinstance(component, nn.Module)
    }


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"no space for the converted weights: {needed:,} bytes are needed, {free:,} are free",
            os.fspath(folder.parent),
        )


def _write(
    pipeline: ReferencePipeline, plan: _Plan, folder: Path, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Weights and configurations; the index, without which it is no pipeline, comes last."""
    files = {}
    for component, module in _modules(pipeline).items():
        entries = list(plan.entries[component].values())
        if isinstance(module, ModelMixin):
            module.save_config(folder / component)
            name = f"{component}/diffusion_pytorch_model.safetensors"
        else:
            config: Any = module.config
            config.architectures = [type(module).__name__]
            config.save_pretrained(folder / component)
            name = f"{component}/model.safetensors"
        files[name] = write_safetensors(folder / name, entries, progress=progress)
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    pipeline.save_config(folder)
    return files


def _write_manifest(folder: Path, system: str, result: Conversion) -> None:
    others = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    manifest = {
        "i2am": i2am.__version__,
        "command": "convert",
        "system": system,
        "pipeline": result.pipeline,
        "sources": result.sources,
        "dropped": result.dropped,
        "files": {
            **digests_of(folder, sorted({*others} - result.files.keys())),
            **result.files,
        },
    }
    (folder / MANIFEST).write_bytes(readable_json(manifest))
