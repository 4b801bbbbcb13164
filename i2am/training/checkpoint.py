"""Checkpoints: one checked safetensors file each, whole or not there."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from i2am.files import make_folder, open_regular, require, write
from i2am.files.container import pack, read_container

log = logging.getLogger(__name__)
NAME = re.compile(r"checkpoint-(\d{8})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """What is needed to go on after `step` steps.

    Args:
        step: Optimiser steps that were made.
        tensors: Named tensors by what they are of: "model", and "ema" where there is one.
        optimiser: State of the optimiser: tensors and JSON values by parameter under "state", JSON
            values under "param_groups".
        notes: JSON values to keep beside them.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    optimiser: Mapping[str, Any]
    notes: Mapping[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Writes ``checkpoint-<step>.safetensors`` and removes older ones but the last `keep`.

    Raises:
        OSError: The disk is full or read-only. Earlier checkpoints are as they were.
    """
    make_folder(folder)
    tensors = {
        f"{kind}/{name}": values
        for kind, named in checkpoint.tensors.items()
        for name, values in named.items()
    }
    plain: dict[str, dict[str, Any]] = {}
    for parameter, state in checkpoint.optimiser["state"].items():
        plain[str(parameter)] = {}
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimiser/{parameter}/{name}"] = value
            else:
                plain[str(parameter)][name] = value
    document = {
        "step": checkpoint.step,
        "notes": dict(checkpoint.notes),
        "kinds": [*checkpoint.tensors],
        "optimiser": {"state": plain, "param_groups": checkpoint.optimiser["param_groups"]},
    }
    final = folder / f"checkpoint-{checkpoint.step:08d}.safetensors"
    write(final, pack(tensors, document))
    for _, path in _found(folder)[:-keep]:
        path.unlink()
    return final


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint in `folder`, None where there is none.

    A damaged one is passed over with a warning.
    """
    for _, path in reversed(_found(folder)):
        try:
            return read_checkpoint(path)
        except ValueError as error:
            log.warning("checkpoint %s; the one before it is taken", error)
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads one checkpoint and compares everything in it with its checksum.

    Raises:
        ValueError: It is truncated, damaged or no checkpoint.
        OSError: It cannot be read.
    """
    with open_regular(path) as file:
        container = read_container(file, path)
        document = container.document
        require(
            document,
            str(path),
            {"step": int, "notes": dict, "kinds": list}
            | {"optimiser.state": dict, "optimiser.param_groups": list},
        )
        stored = container.load_all(file)
    tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in document["kinds"]}
    state = {int(parameter): values for parameter, values in document["optimiser"]["state"].items()}
    for name, values in stored.items():
        kind, _, rest = name.partition("/")
        if kind in tensors:
            tensors[kind][rest] = values
        else:
            parameter, _, field = rest.partition("/")
            state[int(parameter)][field] = values
    groups = [
        # JSON has no tuples, which the optimiser's betas are
        {
            name: tuple(value) if isinstance(value, list) and name != "params" else value
            for name, value in group.items()
        }
        for group in document["optimiser"]["param_groups"]
    ]
    optimiser = {"state": state, "param_groups": groups}
    return Checkpoint(document["step"], tensors, optimiser, document["notes"])


def _found(folder: Path) -> list[tuple[int, Path]]:
    paths = folder.iterdir() if folder.is_dir() else ()
    matches = ((NAME.fullmatch(path.name), path) for path in paths)
    return sorted((int(match.group(1)), path) for match, path in matches if match)
