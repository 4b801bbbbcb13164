"""SHA-256 of files and folders."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from i2am.files.regular import FileRejected, open_regular

_PIECE = 1 << 22


def sha256_of_file(path: str | Path, *, progress: Callable[[int], Any] | None = None) -> str:
    """Hash of a regular file, read in pieces.

    Args:
        path: The file.
        progress: Called with numbers of bytes as they are read.

    Raises:
        FileRejected: It is no regular file.
        OSError: It cannot be read.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            if progress is not None:
                progress(len(piece))
    return digest.hexdigest()


def sha256_of_folder(folder: Path) -> str:
    """Hash over the names and contents of all files in a folder, and in what its links lead to.

    Raises:
        FileRejected: A link leads to a folder that holds it.
        OSError: A file cannot be read.
    """
    return sha256_of_files(folder, sorted(_files_in(folder)))


def sha256_of_files(folder: Path, files: Iterable[Path]) -> str:
    """Hash over names, as seen from `folder`, and contents of files."""
    total = hashlib.sha256()
    for file in files:
        # also a name that is no UTF-8
        name = os.fsencode(file.relative_to(folder).as_posix())
        total.update(name + f"\0{sha256_of_file(file)}\n".encode())
    return total.hexdigest()


def digests_of(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size in "bytes" and "sha256" of files in a folder, by name: what a manifest lists."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of_file(folder / name)}
        for name in names
    }


def is_listed(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file is the one of an entry of `digests_of`; errors as for `sha256_of_file`."""
    with open_regular(path) as file:
        # the size first: the file may be anything
        if os.fstat(file.fileno()).st_size != entry["bytes"]:
            return False
    return sha256_of_file(path) == entry["sha256"]


def _files_in(folder: Path, above: tuple[os.stat_result, ...] = ()) -> Iterator[Path]:
    status = folder.stat()
    if any(os.path.samestat(status, other) for other in above):
        raise FileRejected(f"{folder} leads back to a folder that holds it")
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files_in(path, (*above, status))
        elif path.is_file():
            yield path
