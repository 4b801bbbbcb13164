"""Numbers of a shard's pictures, kept so that an interrupted `i2am score` goes on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from i2am.files import FileRejected, canonical, open_regular, write
from i2am.files.container import pack, read_container

Key = dict[str, Any]
"""JSON values that decide the numbers."""


def load(path: Path, key: Key) -> dict[str, Tensor] | None:
    """The tensors of a file if it was made with this key; None if it has to be made again.

    Args:
        path: The file, there or not, whole or not.
        key: What decides the tensors now.

    Raises:
        OSError: If it is there and cannot be read.
    """
    try:
        with open_regular(path) as file:
            container = read_container(file, path)
            if canonical(container.document.get("key")) != canonical(key):
                return None
            return container.load_all(file)
    except (FileNotFoundError, NotADirectoryError, FileRejected):
        return None


def save(path: Path, key: Key, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors for `load`; the same ones give the same bytes.

    Args:
        path: The file, in an existing folder.
        key: What decides the tensors.
        tensors: By name.

    Raises:
        OSError: If the file cannot be written.
    """
    write(path, pack(tensors, {"key": key}))
