"""Files that appear whole or not at all, whatever happens, power loss included.

The bytes go to a temporary file in the same folder, are flushed to disk, and take the final name by
renaming. Temporary names are random, so that processes of several machines and containers may write
to one folder. Permissions follow the umask, as for any new file.
"""

import errno
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG

Content = bytes | Iterable[bytes | memoryview]
"""Of a file: all of it, or pieces that follow each other."""

_TEMPORARY = re.compile(r"\.i2am-[0-9a-f]{16}\.tmp")
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}


def write(path: str | Path, content: Content) -> None:
    """Write a file that is complete or as it was.

    Args:
        path: A file in an existing folder; an existing one is replaced.
        content: All of it.

    Raises:
        OSError: A step failed; the temporary file is removed then.
    """
    path = Path(path)
    write_together(path.parent, {path.name: content})


def write_together(folder: Path, contents: Mapping[str, Content]) -> None:
    """Write several files so that a full disk changes none of them.

    All are written and flushed under temporary names before the first gets its own.

    Args:
        folder: An existing folder.
        contents: By name.

    Raises:
        OSError: A step failed; temporary files are removed then.
    """
    with _flushed(folder, [*contents.values()]) as temporary:
        for source, name in zip(temporary, contents, strict=True):
            os.replace(source, folder / name)
    sync(folder)


def publish(path: Path, content: Content) -> None:
    """Write a file unless there is one; of processes that do so at once, the first one wins.

    Raises:
        OSError: A step failed.
    """
    with _flushed(path.parent, [content]) as (temporary,):
        try:
            os.link(temporary, path)
        except (FileExistsError, FileNotFoundError):
            # another process was faster, and may have taken our temporary file for a leftover
            pass
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # a file system without links: of two processes at the same moment the last one wins
            os.replace(temporary, path)
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def append(path: Path, text: str) -> None:
    """Append to a file at once, so that lines of several processes stay whole.

    Args:
        path: A regular file, or none yet.
        text: One line or more, each with its newline.

    Raises:
        OSError: It cannot be written, or is a link, pipe or device.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        if not S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        data = text.encode()
        while data:
            data = data[os.write(descriptor, data) :]
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on disk."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name() -> str:
    """A name that no other process has, and that `is_temporary` knows."""
    return f".i2am-{secrets.token_hex(8)}.tmp"


def is_temporary(name: str) -> bool:
    """Whether a file or folder has a name of `temporary_name`."""
    return _TEMPORARY.fullmatch(name) is not None


@contextmanager
def _flushed(folder: Path, contents: Sequence[Content]) -> Iterator[list[Path]]:
    """Temporary files on disk, one for each content; removed if the block fails."""
    written: list[Path] = []
    try:
        for content in contents:
            path = folder / temporary_name()
            with open(path, "xb") as file:
                written.append(path)
                for piece in [content] if isinstance(content, bytes) else content:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
        yield written
    # BaseException: Ctrl-C must not leave temporary files either
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
