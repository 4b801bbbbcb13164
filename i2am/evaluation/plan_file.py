"""``run.json``: what a run is, written once and never changed."""

import errno
import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

from i2am.attribution.storage import write_atomically
from i2am.evaluation.errors import StoreConflict, StoreDamaged
from i2am.evaluation.folder_lock import is_leftover, make_folder, sync_folder
from i2am.evaluation.shard_header import SCHEMA, canonical

# of one file in whatever folder, whatever the system
_NAME = re.compile(r"[^/\\\0]+", re.DOTALL)
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}


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
        _publish(path(folder), data)
        stored = read(folder)
    if stored is None:
        raise StoreDamaged(f"{path(folder)} was removed while it was being made")
    if stored["fingerprint"] != plan["fingerprint"]:
        raise StoreConflict(
            f"{folder} holds another run, which differs in {_differences(stored, plan)}; "
            "name another folder"
        )
    return stored


def check_free(folder: Path) -> None:
    """Refuses a folder without a ``run.json`` that holds something else.

    Raises:
        StoreConflict: Naming it.
        OSError: If the folder cannot be read.
    """
    strange = [name for name in _names(folder) if not is_leftover(name)]
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
        data = path(folder).read_bytes()
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise StoreConflict(f"{folder} is a file, a folder was expected") from None
    try:
        plan = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreDamaged(f"{path(folder)} is damaged: {error}") from error
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
    try:
        schema, fingerprint, size = plan["schema"], plan["fingerprint"], plan["settings"]["shard"]
        pairs = {name: plan["data"]["pairs"][name] for name in plan["settings"]["pairs"]}
        ids = {name: [pair[0] for pair in of] for name, of in pairs.items()}
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"plan has no {error}") from error
    if schema != SCHEMA:
        raise ValueError(f"plan must have schema {SCHEMA}, got {schema!r}")
    if not isinstance(fingerprint, str) or not fingerprint:
        raise ValueError(f"plan must have a fingerprint, got {fingerprint!r}")
    if type(size) is not int or size < 1:
        raise ValueError(f"plan must have at least 1 sample in a shard, got {size!r}")
    for setting, found in ids.items():
        if not _is_name(setting):
            raise ValueError(f"settings of a plan must be bare file names, got {setting!r}")
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


def _publish(target: Path, data: bytes) -> None:
    """Writes a file whole, unless one has that name already."""
    temporary = target.with_name(f".i2am-{secrets.token_hex(8)}.tmp")
    try:
        write_atomically(temporary, data)
        os.link(temporary, target)
    except (FileExistsError, FileNotFoundError):
        # another process was faster, and may have taken our temporary file for a leftover
        return
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # a file system without links: of two processes at the same moment the last one wins
        write_atomically(target, data)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(target.parent)


def _differences(stored: dict[str, Any], plan: dict[str, Any]) -> str:
    ours, theirs = dict(_leaves(plan)), dict(_leaves(stored))
    found = []
    for key in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(key), theirs.get(key)
        if mine != other and key != "fingerprint":
            long = isinstance(mine, list) or isinstance(other, list)
            found.append(key if long else f"{key} ({other!r} there, {mine!r} now)")
    return ", ".join(found) or "its fingerprint"


def _leaves(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves = []
    for key, item in value.items():
        if isinstance(item, dict):
            leaves += _leaves(item, f"{prefix}{key}.")
        else:
            leaves.append((f"{prefix}{key}", item))
    return leaves
