"""Checkpoints that are whole or not there: written aside, hashed, synced and renamed."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from i2am.models.weights import in_one_sentence

log = logging.getLogger(__name__)
STATE = "state.json"
OPTIMISER = "optimizer.pt"
NAME = re.compile(r"checkpoint-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """What is needed to go on after `step` steps.

    Args:
        step: Optimiser steps that were made.
        tensors: Named tensors by the name of their file: "model", and "ema" where there is one.
        optimiser: State of the optimiser.
        notes: Plain values to keep beside them.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    optimiser: Mapping[str, Any]
    notes: Mapping[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Writes ``checkpoint-<step>`` into `folder` and removes older ones but the last `keep`.

    Raises:
        OSError: The disk is full or read-only. Earlier checkpoints are as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".checkpoint-*"):
        shutil.rmtree(leftover)
    final = folder / f"checkpoint-{checkpoint.step:08d}"
    partial = folder / f".{final.name}.partial"
    partial.mkdir()
    try:
        with _disk_faults(final):
            for name, tensors in checkpoint.tensors.items():
                plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
                save_file(plain, partial / f"{name}.safetensors")
            torch.save(dict(checkpoint.optimiser), partial / OPTIMISER)
        hashes = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        state = {"step": checkpoint.step, "notes": dict(checkpoint.notes), "sha256": hashes}
        (partial / STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
        for path in [*partial.iterdir(), partial]:
            sync(path)
        if final.exists():
            _remove(final)
        partial.rename(final)
        sync(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for _, path in _found(folder)[:-keep]:
        _remove(path)
    return final


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint in `folder`, None where there is none.

    A damaged one is passed over with a warning.
    """
    for _, path in reversed(_found(folder)):
        try:
            return read_checkpoint(path)
        except ValueError as error:
            log.warning("%s; the one before it is taken", error)
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads one checkpoint after comparing every file with its hash.

    Raises:
        ValueError: A file is missing, is not the one that was written, or there are others.
    """
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        step, notes, hashes = int(state["step"]), dict(state["notes"]), dict(state["sha256"])
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {path} has no readable {STATE}") from error
    for name, expected in hashes.items():
        file = path / name
        if not file.is_file() or _sha256(file) != expected:
            raise ValueError(f"checkpoint {path} is damaged: {name} is not what was written")
    with in_one_sentence(f"checkpoint {path} is damaged"):
        files = [name for name in hashes if name.endswith(".safetensors")]
        tensors = {Path(name).stem: load_file(path / name) for name in files}
        optimiser = torch.load(path / OPTIMISER, map_location="cpu", weights_only=True)
    return Checkpoint(step, tensors, optimiser, notes)


def save_folder(final: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a folder that appears complete or not at all."""
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write(partial)
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(partial, final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _disk_faults(path: Path) -> Iterator[None]:
    # a full disk is a SafetensorError in one library and a RuntimeError in the other
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def _remove(path: Path) -> None:
    # out of sight first: half of a checkpoint must not look like a damaged one
    hidden = path.with_name(f".{path.name}.old")
    path.rename(hidden)
    shutil.rmtree(hidden)


def _found(folder: Path) -> list[tuple[int, Path]]:
    paths = folder.iterdir() if folder.is_dir() else ()
    matches = ((NAME.fullmatch(path.name), path) for path in paths)
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
