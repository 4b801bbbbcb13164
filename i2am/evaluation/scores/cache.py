"""Numbers of a shard's pictures, kept so that an interrupted `i2am score` goes on."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from i2am.attribution.storage import write_atomically
from i2am.evaluation.folder_lock import make_folder
from i2am.evaluation.shard_header import canonical

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
    from safetensors import SafetensorError
    from safetensors.torch import load as parse

    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        tensors = parse(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        document = json.loads(header["__metadata__"]["i2am"])
    except (SafetensorError, ValueError, KeyError, TypeError):
        return None
    return tensors if document == _document(key, tensors) else None


def save(path: Path, key: Key, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors for `load`; the same ones give the same bytes.

    Raises:
        OSError: If the file or its folder cannot be written.
    """
    from safetensors.torch import save as serialize

    make_folder(path.parent)
    metadata = {"i2am": canonical(_document(key, tensors)).decode()}
    write_atomically(path, serialize(dict(tensors), metadata=metadata))


def _document(key: Key, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    checksums = {name: zlib.crc32(tensor.numpy().data) for name, tensor in tensors.items()}
    return {"key": json.loads(canonical(key)), "checksums": checksums}
