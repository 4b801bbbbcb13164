"""Which processes write to a folder, so that leftovers of dead ones can be removed."""

import os
import shutil
import weakref
from collections.abc import Iterable
from pathlib import Path

from i2am.files.atomic import is_temporary

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class FolderLock:
    """Held by each writing process until it ends, however that happens.

    Temporary files and folders are removed when no other process holds it. Where files cannot be
    locked they stay; they are harmless.
    """

    def __init__(self, file: Path, *, clean: Iterable[Path]) -> None:
        """Takes the lock.

        Args:
            file: An existing file that stands for the folder.
            clean: Folders with temporary files of `i2am.files`.

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
        found = [entry for entry in entries if is_temporary(entry.name)]
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            Path(entry.path).unlink(missing_ok=True)
