"""Reading a shard's file: its description first, then the tensors that are asked for."""

import io
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from i2am.evaluation.errors import StoreConflict, StoreDamaged

SCHEMA = 1
"""Version of shards and of ``run.json`` that is written, and the newest that can be read."""

DTYPES = {
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U8": torch.uint8,
}
"""Of tensors, by their names in a safetensors file."""


@dataclass(frozen=True)
class Header:
    """The first part of a shard's file: what is in it, and where.

    Attributes:
        document: The metadata entry, as `Shard.to_bytes` made it.
        places: First byte in the file and number of bytes of each tensor.
        name: What to call the file in messages.
    """

    document: dict[str, Any]
    places: dict[str, tuple[int, int]]
    name: str

    def load(self, file: BinaryIO, tensor: str, *, check: bool) -> Tensor:
        """Reads one tensor.

        Args:
            file: The file that this is the header of.
            tensor: Its name.
            check: Whether to compare it with its checksum.

        Raises:
            StoreDamaged: If it does not match.
            OSError: If it cannot be read.
        """
        start, length = self.places[tensor]
        file.seek(start)
        data = bytearray(file.read(length))
        summary = self.document["tensors"][tensor]
        if len(data) != length or (check and zlib.crc32(data) != summary["crc32"]):
            raise StoreDamaged(f"{self.name} is damaged: {tensor} does not match its checksum")
        dtype = DTYPES[summary["dtype"]]
        # frombuffer refuses an empty buffer
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.reshape(summary["shape"])


def read_header(file: BinaryIO, name: str | Path = "the shard") -> Header:
    """Reads the description of a shard, and checks it against itself and the file's length.

    Args:
        file: The whole file.
        name: What to call it in messages.

    Raises:
        StoreDamaged: If the file is truncated, has an altered description, or is not a shard.
        StoreConflict: If it was written by another version of i2am.
        OSError: If it cannot be read.
    """
    # by hand: safetensors maps files into memory, where a failing disk kills the process
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    start = 8 + length
    if size < 8 or start > size:
        raise StoreDamaged(f"{name} is truncated or not a safetensors file")
    try:
        entries = json.loads(file.read(length))
        text = entries.pop("__metadata__")["i2am"]
        document = json.loads(text)
        checksum = document.pop("checksum")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreDamaged(f"{name} is damaged, or not a shard of i2am") from error
    # of the text, not of what it says: then no byte can change unseen
    if checksum != zlib.crc32(text.replace(f'"checksum":{checksum},', "", 1).encode()):
        raise StoreDamaged(f"{name} is damaged: its description does not match its checksum")
    schema = document.get("schema")
    if schema != SCHEMA:
        raise StoreConflict(
            f"{name} has schema {schema} and this i2am reads schema {SCHEMA}; "
            "read it with the version of i2am that wrote it"
        )
    try:
        places = _places(entries, document["tensors"], size - start)
    except (ValueError, KeyError, TypeError) as error:
        raise StoreDamaged(f"{name} is truncated or damaged: {error}") from error
    places = {tensor: (start + begin, bytes) for tensor, (begin, bytes) in places.items()}
    return Header(document, places, str(name))


def canonical(document: Any) -> bytes:
    """JSON with one way to write each value.

    Raises:
        ValueError: If it holds NaN or something that is no JSON value.
    """
    try:
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return text.encode()


def _places(
    entries: dict[str, Any], summaries: dict[str, Any], size: int
) -> dict[str, tuple[int, int]]:
    places, end = {}, 0
    for tensor, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        summary = summaries[tensor]
        if (entry["dtype"], entry["shape"]) != (summary["dtype"], summary["shape"]):
            raise ValueError(f"{tensor} is not as described")
        length = DTYPES[entry["dtype"]].itemsize * math.prod(entry["shape"])
        if entry["data_offsets"] != [end, end + length]:
            raise ValueError(f"{tensor} is not where it should be")
        places[tensor], end = (end, length), end + length
    if end != size:
        raise ValueError(f"its tensors take {end} bytes, and it has {size}")
    if missing := sorted(summaries.keys() - places.keys()):
        raise ValueError(f"{missing[0]} is missing")
    return places
