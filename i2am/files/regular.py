"""Opening files that anybody may have left: regular files of a sensible size, nothing else."""

import errno
import os
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import BinaryIO, cast

# a FIFO would wait for its other end
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)


class FileRejected(ValueError):
    """A path names no regular file, or its content is not what it should be; one sentence."""


class FileTooLarge(FileRejected):
    """A file is larger than any file of its kind."""


def open_regular(
    path: str | Path, *, what: str | None = None, limit: int | None = None
) -> BinaryIO:
    """Open a regular file, or a link to one, for reading; never waits.

    Args:
        path: The file.
        what: What to call it in messages; None takes the path.
        limit: The most bytes that it may have; None for any number.

    Returns:
        The file without a buffer: a read may return fewer bytes than it is asked for.

    Raises:
        FileRejected: It is a folder, pipe, socket or device.
        FileTooLarge: It has more than `limit` bytes.
        OSError: It is missing, or cannot be opened.
    """
    what = str(path) if what is None else what
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        # for readers as any other link to nothing
        raise FileNotFoundError(errno.ENOENT, "a link to itself", os.fspath(path)) from error
    # before it is opened too, because to open a device may do something
    _check_regular(mode, what)
    file = open(path, "rb", buffering=0, opener=_open)
    try:
        status = os.fstat(file.fileno())
        _check_regular(status.st_mode, what)
        if limit is not None and status.st_size > limit:
            raise FileTooLarge(
                f"{what} must have at most {limit:,} bytes, it has {status.st_size:,}"
            )
    except BaseException:
        file.close()
        raise
    return cast(BinaryIO, file)


def read_bytes(path: str | Path, *, what: str | None = None, limit: int | None = None) -> bytes:
    """The content of a regular file; arguments and errors as for `open_regular`."""
    with open_regular(path, what=what, limit=limit) as file:
        return file.read()


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | _NO_WAIT)


def _check_regular(mode: int, what: str) -> None:
    if S_ISDIR(mode):
        raise FileRejected(f"{what} is a folder, a file was expected")
    if not S_ISREG(mode):
        raise FileRejected(f"{what} must be a regular file, it is a pipe or a device")
