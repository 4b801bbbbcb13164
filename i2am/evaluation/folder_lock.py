"""Which processes write to a folder, so that leftovers of dead ones can be removed."""

import os
import weakref
from collections.abc import Iterable
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class FolderLock:
    """Held by each writing process until it ends, however that happens.

    Temporary files are removed when no other process holds it. Where files cannot be locked they
    stay; they are harmless.
    """

    def __init__(self, file: Path, *, clean: Iterable[Path]) -> None:
        """Takes the lock.

        Args:
            file: An existing file that stands for the folder.
            clean: Folders with temporary files of `write_atomically`.

        Raises:
            OSError: If the file cannot be opened for writing, or a leftover cannot be removed.
        """
        # writable, because locks over NFS need that
        descriptor = os.open(file, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
        try:
            if fcntl is not None:
                _lock(descriptor, clean)
        except BaseException:
            # now, not when the exception is forgotten: others wait for it
            os.close(descriptor)
            raise
        weakref.finalize(self, os.close, descriptor)


def make_folder(folder: Path) -> None:
    """Makes a folder with its parents, so that they stay there after a power loss.

    Raises:
        OSError: If that fails.
    """
    if not folder.parent.is_dir():
        make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    # also of a folder that was there: who made it may have died before this
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to disk."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_leftover(name: str) -> bool:
    """Whether a file has a temporary name of `write_atomically`."""
    return name.startswith(".i2am-") and name.endswith(".tmp")


def _lock(descriptor: int, clean: Iterable[Path]) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = True
    except OSError:
        # held by another process, or locks are not supported
        alone = False
    if alone:
        for folder in clean:
            _remove_leftovers(folder)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    except OSError:
        if alone:
            raise


def _remove_leftovers(folder: Path) -> None:
    with os.scandir(folder) as entries:
        found = [entry.path for entry in entries if is_leftover(entry.name)]
    for path in found:
        Path(path).unlink(missing_ok=True)
