"""Output folders: free or refused, and complete or not there at all."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from i2am.files.atomic import sync, temporary_name
from i2am.files.json_files import read_json
from i2am.files.regular import FileRejected

MANIFEST = "run.json"
"""Names, under "files", all other files of a folder."""


class OutputRefused(Exception):
    """An output cannot be written there, or something there is to be kept; one sentence."""


def check_place(out: Path, *, kind: Literal["file", "folder"]) -> None:
    """Refuse a path at which an output cannot be made.

    Raises:
        OutputRefused: Its name is no UTF-8, it is a link to nothing, what is above it is no folder,
            or it is there and of the other kind.
    """
    try:
        str(out).encode()
    except UnicodeEncodeError:
        raise OutputRefused(f"output {out} must have a name in UTF-8") from None
    if out.is_symlink() and not out.exists():
        raise OutputRefused(f"output {out} is a link to nothing")
    above = [parent for parent in out.absolute().parents if os.path.lexists(parent)]
    if above and not above[0].is_dir():
        raise OutputRefused(f"output {out} cannot be made, because {above[0]} is no folder")
    if kind == "file" and out.is_dir():
        raise OutputRefused(f"output {out} is a folder, a file was expected")
    if kind == "folder" and out.exists() and not out.is_dir():
        raise OutputRefused(f"output {out} is a file, a folder was expected")


def check_free(out: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that cannot be made, or that holds something to be kept.

    Args:
        out: The folder to be written.
        overwrite: Whether an earlier result may be replaced.

    Raises:
        OutputRefused: `out` is a link, a mount point, the current folder or one that holds it, or
            has a name that is no UTF-8; it is a file, or a folder that is not empty; with
            `overwrite`, a folder with files that its own ``run.json`` does not list.
        OSError: It cannot be read.
    """
    _check_replaceable(out)
    if not out.exists():
        return
    found = sorted(out.rglob("*"))
    if not found:
        return
    if not overwrite:
        raise OutputRefused(f"output folder {out} is not empty; name another, or add --overwrite")
    try:
        listed = read_json(out / MANIFEST)["files"]
        ours = {out / name for name in (MANIFEST, *listed)}
    except (FileNotFoundError, FileRejected, KeyError, TypeError):
        raise OutputRefused(
            f"output folder {out} was not written by i2am (it has no {MANIFEST}), so it is kept"
        ) from None
    ours |= {parent for path in ours for parent in path.parents}
    foreign = [path.relative_to(out) for path in found if path not in ours]
    if foreign:
        raise OutputRefused(
            f"output folder {out} holds {foreign[0]}, which i2am did not write, so it is kept"
        )


@contextmanager
def fresh_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Build a folder beside its final place and rename it there when the block ends well.

    Args:
        out: The final path.
        overwrite: Whether an earlier result may be replaced; it stays until the new one is whole.

    Yields:
        An empty folder to write into. After an exception it is gone, and `out` is as it was, or new
        if nothing failed but to flush its name.

    Raises:
        OutputRefused: As for `check_free`, before and after the block.
        OSError: The folder cannot be made or written.
    """
    with _built(out, lambda: check_free(out, overwrite=overwrite)) as partial:
        yield partial


@contextmanager
def replaced_folder(out: Path) -> Iterator[Path]:
    """As `fresh_folder`, for a folder that is ours alone: whatever is there is replaced."""
    with _built(out, lambda: _check_replaceable(out)) as partial:
        yield partial


def make_folder(folder: Path) -> None:
    """Make a folder with its parents, so that they stay there after a power loss.

    Raises:
        OSError: It cannot be made.
    """
    if not folder.parent.is_dir():
        make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    # also of a folder that was there: who made it may have died before this
    sync(folder.parent)


def refuse_links(root: Path) -> None:
    """Refuse a folder with a link in it.

    Raises:
        OutputRefused: Naming the link.
    """
    for path in root.rglob("*"):
        if path.is_symlink():
            raise OutputRefused(f"{path} is a link, and nothing is written through it")


def inner_folder(root: Path, *names: str) -> Path:
    """Make a folder inside of another one, without following a link out of it.

    Args:
        root: An existing folder.
        names: The folders on the way, the last one included.

    Raises:
        OutputRefused: One of them is a link or a file.
        OSError: One cannot be made.
    """
    folder = root
    for name in names:
        folder = folder / name
        if folder.is_symlink():
            raise OutputRefused(f"{folder} is a link, and nothing is written through it")
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError:
            raise OutputRefused(f"{folder} is a file, a folder was expected") from None
        sync(folder.parent)
    return folder


@contextmanager
def _built(out: Path, check: Callable[[], None]) -> Iterator[Path]:
    check()
    missing = [parent for parent in out.absolute().parents if not parent.exists()]
    partial = out.absolute().with_name(temporary_name())
    try:
        make_folder(partial)
        yield partial
        for path in [*sorted(partial.rglob("*")), partial]:
            sync(path)
        check()
        _replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in missing:
            # what others have put there meanwhile stays
            with suppress(OSError):
                parent.rmdir()
        raise


def _replace(partial: Path, out: Path) -> None:
    if not out.exists():
        try:
            partial.rename(out)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise OutputRefused(f"output folder {out} was made meanwhile, so it is kept") from error
        sync(partial.parent)
        return
    old = partial.with_name(temporary_name())
    out.rename(old)
    try:
        partial.rename(out)
    except BaseException:
        old.rename(out)
        raise
    # first: after a power loss the old name may lead to the old folder, which must be whole then
    sync(partial.parent)
    shutil.rmtree(old, ignore_errors=True)


def _check_replaceable(out: Path) -> None:
    """Refuse what a folder cannot be renamed to, which would be found out at the end only."""
    check_place(out, kind="folder")
    if out.is_symlink():
        raise OutputRefused(f"output {out} is a link; name the folder itself")
    if out.is_dir():
        here = Path.cwd()
        if any(out.samefile(folder) for folder in (here, *here.parents)):
            raise OutputRefused(f"output {out} is the current folder or holds it; name one in it")
        if out.is_mount():
            raise OutputRefused(f"output {out} is a mount point; name a folder in it")
    if out.name == "..":
        raise OutputRefused(f"output {out} must end with a name of its own")
