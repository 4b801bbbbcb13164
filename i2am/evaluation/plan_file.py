"""``run.json``: what a run is, written once and never changed."""

import os
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

from i2am.evaluation.errors import StoreConflict, StoreDamaged
from i2am.evaluation.shard import SCHEMA
from i2am.files import (
    FileRejected,
    canonical,
    check_place,
    make_folder,
    parse_json,
    publish,
    read_bytes,
    require,
)
from i2am.files.atomic import is_temporary

_FIELDS = {
    "schema": int,
    "i2am": str,
    "fingerprint": str,
    "model": dict,
    "model.name": str,
    "data": dict,
    "data.folder": str,
    "data.split": str,
    "data.pairs": dict,
    "settings.pairs": list,
    "settings.shard": int,
    "settings.size": list,
    "settings.steps": int,
    "settings.guidance": float,
    "settings.seed": int,
    "settings.preset": str,
    "settings.maps": str,
}
_PAIR = [str, str, str, int, str]
# of one file in whatever folder, whatever the system
_NAME = re.compile(r"[^/\\\0]+", re.DOTALL)
RUN_LIMIT = 2**31
"""The most bytes of a ``run.json``; that of ten million pairs has less."""


def path(folder: Path) -> Path:
    """Where it lies in a run folder."""
    return folder / "run.json"


def create(folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Makes a run folder with its ``run.json``, unless there is one of the same run.

    Args:
        folder: Absent, empty, or of this run.
        plan: What `check` accepts.

    Returns:
        The plan that is stored.

    Raises:
        StoreConflict: If the folder holds something else; it is unchanged then.
        StoreDamaged: If its ``run.json`` is damaged.
        OSError: If it cannot be written.
    """
    data = canonical(plan)
    stored = read(folder)
    if stored is None:
        check_free(folder)
        make_folder(folder)
        publish(path(folder), data)
        stored = read(folder)
    if stored is None:
        raise StoreDamaged(f"{path(folder)} was removed while it was being made")
    if stored["fingerprint"] != plan["fingerprint"]:
        raise StoreConflict(
            f"{folder} holds another run, which differs in {_differences(stored, plan)}; "
            "name another folder"
        )
    return stored


def fingerprint_of(plan: dict[str, Any]) -> str:
    """SHA-256 of a plan without names of places and what is counted in another way already."""
    model = {key: value for key, value in plan["model"].items() if key != "name"}
    data = {key: plan["data"].get(key) for key in ("split", "digest")}
    deciding = {key: value for key, value in plan.items() if key != "fingerprint"}
    return sha256(canonical({**deciding, "model": model, "data": data})).hexdigest()


def check_free(folder: Path) -> None:
    """Refuses a folder without a ``run.json`` that holds something else, or cannot be made.

    Raises:
        StoreConflict: Naming what it holds.
        OutputRefused: It cannot be made.
        OSError: If the folder cannot be read.
    """
    check_place(folder, kind="folder")
    strange = [name for name in _names(folder) if not is_temporary(name)]
    if strange:
        raise StoreConflict(
            f"{folder} holds {min(strange)} but no run of i2am evaluate; name another folder"
        )


def read(folder: Path) -> dict[str, Any] | None:
    """The plan of a run folder; None if there is no ``run.json`` in it.

    Raises:
        StoreConflict: If it is not one of i2am evaluate, or of another version of it, or
            `folder` is a file.
        StoreDamaged: If it is damaged.
        OSError: If it cannot be read.
    """
    try:
        data = read_bytes(path(folder), limit=RUN_LIMIT)
        plan = parse_json(data, str(path(folder)))
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise StoreConflict(f"{folder} is a file, a folder was expected") from None
    except FileRejected as error:
        raise StoreDamaged(str(error)) from error
    if not isinstance(plan, dict) or not {"schema", "fingerprint"} <= plan.keys():
        raise StoreConflict(f"{path(folder)} was not written by i2am evaluate")
    if plan["schema"] != SCHEMA:
        raise StoreConflict(
            f"{path(folder)} has schema {plan['schema']} and was written by i2am "
            f"{plan.get('i2am')}; this i2am reads schema {SCHEMA}"
        )
    try:
        check(plan)
        if canonical(plan) != data:
            raise ValueError("it is not as it was written")
    except ValueError as error:
        raise StoreDamaged(f"{path(folder)} is damaged: {error}") from error
    return plan


def check(plan: dict[str, Any]) -> None:
    """Refuses a plan without what a store needs.

    Raises:
        ValueError: Naming it.
    """
    require(plan, "plan", _FIELDS)
    if plan["schema"] != SCHEMA:
        raise ValueError(f"plan must have schema {SCHEMA}, got {plan['schema']!r}")
    if (fingerprint := fingerprint_of(plan)) != plan["fingerprint"]:
        raise ValueError(
            f"plan must have the fingerprint of its content, {fingerprint}, got "
            f"{plan['fingerprint']}"
        )
    size = plan["settings"]["shard"]
    if size < 1:
        raise ValueError(f"plan must have at least 1 sample in a shard, got {size}")
    if [*map(type, plan["settings"]["size"])] != [int, int]:
        raise ValueError(f"size of a plan must be two integers, got {plan['settings']['size']}")
    for setting in plan["settings"]["pairs"]:
        if not _is_name(setting):
            raise ValueError(f"settings of a plan must be bare file names, got {setting!r}")
        require(plan, "plan", {f"data.pairs.{setting}": list})
        pairs = plan["data"]["pairs"][setting]
        for pair in pairs:
            if not isinstance(pair, list) or [*map(type, pair)] != _PAIR:
                raise ValueError(
                    "pairs of a plan must be an id, a person, a garment, a line and a file name, "
                    f"got {pair!r}"
                )
        found = [pair[0] for pair in pairs]
        if strange := [id for id in found if not _is_name(id)]:
            raise ValueError(
                f"ids of a plan must be bare file names of at most 240 bytes, got {strange[0]!r}"
            )
        if not found or len(set(found)) < len(found):
            raise ValueError(f"ids of {setting} must be distinct, and at least one")


def _is_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and _NAME.fullmatch(name) is not None
        and name not in (".", "..")
        and (len(name) <= 60 or len(os.fsencode(name)) <= 240)
    )


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _differences(stored: dict[str, Any], plan: dict[str, Any]) -> str:
    ours, theirs = dict(_leaves(plan)), dict(_leaves(stored))
    found = []
    for key in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(key), theirs.get(key)
        if mine != other and key != "fingerprint":
            long = isinstance(mine, list) or isinstance(other, list)
            found.append(key if long else f"{key} ({other!r} there, {mine!r} now)")
    return ", ".join(found)


def _leaves(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves = []
    for key, item in value.items():
        if isinstance(item, dict):
            leaves += _leaves(item, f"{prefix}{key}.")
        else:
            leaves.append((f"{prefix}{key}", item))
    return leaves
