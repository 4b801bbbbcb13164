"""An output folder that appears complete or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "run.json"
"""Names, under "files", all other files of the folder."""


class FolderInUse(Exception):
    """The output folder holds something that is to be kept; the message says what."""


def check_free(out: Path, *, overwrite: bool) -> None:
    """Refuse an output path that holds something, or something that is not a result of ours.

    Args:
        out: The folder to be written.
        overwrite: Whether an earlier result may be replaced.

    Raises:
        FolderInUse: `out` is a file, or a folder that is not empty; with `overwrite`, a folder
            with files that its own ``run.json`` does not list.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise FolderInUse(f"output {out} is a file, a folder was expected")
    found = sorted(out.rglob("*"))
    if not found:
        return
    if not overwrite:
        raise FolderInUse(f"output folder {out} is not empty; name another, or add --overwrite")
    try:
        listed = json.loads((out / MANIFEST).read_text(encoding="utf-8"))["files"]
        ours = {out / name for name in (MANIFEST, *listed)}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        raise FolderInUse(
            f"output folder {out} was not written by i2am (it has no {MANIFEST}), so it is kept"
        ) from None
    ours |= {parent for path in ours for parent in path.parents}
    foreign = [path.relative_to(out) for path in found if path not in ours]
    if foreign:
        raise FolderInUse(
            f"output folder {out} holds {foreign[0]}, which i2am did not write, so it is kept"
        )


@contextmanager
def fresh_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Build a folder beside its final place and rename it there when the block ends well.

    Args:
        out: The final path.
        overwrite: Whether an earlier result may be replaced; it stays until the new one is whole.

    Yields:
        An empty folder to write into. After an exception it is gone, and `out` is as it was.

    Raises:
        FolderInUse: As for `check_free`, before and after the block.
        OSError: The folder cannot be made or written.
    """
    check_free(out, overwrite=overwrite)
    missing = [parent for parent in out.absolute().parents if not parent.exists()]
    partial = out.absolute().parent / f".{out.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        yield partial
        _to_disk(partial)
        check_free(out, overwrite=overwrite)
        _replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in missing:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


def _replace(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
        return
    old = partial.with_name(f".{out.name}.old-{os.getpid()}")
    out.rename(old)
    try:
        partial.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old)


def _to_disk(folder: Path) -> None:
    for path in [*sorted(folder.rglob("*")), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
