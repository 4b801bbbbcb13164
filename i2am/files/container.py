"""Tensors and a JSON document in one safetensors file, with a checksum of everything.

The file has a single metadata entry, ``i2am``: the document as canonical JSON, with the CRC-32,
dtype and shape of each tensor under ``tensors`` and its own CRC-32 under ``checksum``. Equal
content gives equal bytes, in the layout that safetensors itself writes.
"""

import io
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from i2am.files.json_files import canonical, parse_json
from i2am.files.regular import FileRejected

DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What can be stored, and safetensors' word for it; in the order in which a file holds them."""

# safetensors' own limit, in bytes
_LONGEST_HEADER = 100_000_000
_SIZES = {code: dtype.itemsize for dtype, code in DTYPES.items()}
# files of schema 1 and 2 of maps were written with torch's words
_BY_NAME = {name: dtype for dtype, code in DTYPES.items() for name in (code, str(dtype))}


@dataclass(frozen=True)
class Container:
    """The first part of a file: what is in it, and where.

    Attributes:
        document: What was packed.
        places: First byte in the file and number of bytes of each tensor.
        name: What to call the file in messages.
    """

    document: dict[str, Any]
    places: Mapping[str, tuple[int, int]]
    name: str

    def load(self, file: BinaryIO, tensor: str, *, check: bool = True) -> Tensor:
        """Read one tensor onto the CPU.

        Args:
            file: The file that `read_container` read.
            tensor: Its name.
            check: Whether to compare it with its checksum.

        Raises:
            FileRejected: It does not match.
            OSError: It cannot be read.
            MemoryError: It does not fit into memory.
        """
        start, length = self.places[tensor]
        summary = self.document["tensors"][tensor]
        file.seek(start)
        try:
            data = torch.empty(length, dtype=torch.uint8)
        except RuntimeError as error:
            raise MemoryError(f"{self.name} holds {tensor} of {length:,} bytes") from error
        whole = _fill(file, data.numpy().data)
        if not whole or (check and zlib.crc32(data.numpy().data) != summary["crc32"]):
            raise FileRejected(
                f"{self.name} is damaged: the tensor {tensor} does not match its checksum"
            )
        return data.view(_BY_NAME[summary["dtype"]]).reshape(summary["shape"])

    def load_all(self, file: BinaryIO) -> dict[str, Tensor]:
        """Read and check every tensor; errors as for `load`."""
        return {name: self.load(file, name) for name in self.places}


def pack(
    tensors: Mapping[str, Tensor], document: Mapping[str, Any]
) -> Iterator[bytes | memoryview]:
    """The bytes of a file, piece by piece: no more than one tensor is copied at a time.

    Args:
        tensors: Of dtypes of `DTYPES`, on any device.
        document: JSON values; without the keys ``tensors`` and ``checksum``.

    Raises:
        ValueError: The document holds NaN, or something that is no JSON value.
    """
    # through JSON once, because integer keys sort differently after they have become strings
    content = json.loads(canonical({**document, "tensors": {}}))
    content["tensors"] = {
        name: {
            "crc32": zlib.crc32(_bytes(tensor)),
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
        }
        for name, tensor in tensors.items()
    }
    # the description has one of its own: a damaged name has no tensor to give it away
    content["checksum"] = zlib.crc32(canonical(content))
    facts = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    names, header = header_of(facts, {"i2am": canonical(content).decode()})
    yield header
    for name in names:
        yield _bytes(tensors[name])


def header_of(
    tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[list[str], bytes]:
    """The beginning of a safetensors file.

    Args:
        tensors: Name, dtype and shape of each.
        metadata: What to say about them.

    Returns:
        The names in the order in which the tensors have to follow, and the bytes before them.
    """
    # wide dtypes first: every tensor begins at a multiple of its element's size
    order = [*DTYPES]
    tensors = sorted(tensors, key=lambda entry: (order.index(entry[1]), entry[0]))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, dtype, shape in tensors:
        end = begin + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned too
    return [name for name, *_ in tensors], len(text).to_bytes(8, "little") + text


def read_container(file: BinaryIO, name: str | Path) -> Container:
    """Read the description of a file, and check it against itself and the file's length.

    Args:
        file: What `pack` made, all of it.
        name: What to call it in messages.

    Raises:
        FileRejected: It is truncated, its description was altered, or it is another file.
        OSError: It cannot be read.
    """
    # by hand: safetensors maps files into memory, where a failing disk kills the process
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    length = int.from_bytes(_exactly(file, min(8, size)), "little")
    start = 8 + length
    if size < 8 or start > size or length > _LONGEST_HEADER:
        raise FileRejected(f"{name} is truncated or not a safetensors file")
    try:
        entries = parse_json(_exactly(file, length), str(name))
        metadata = entries.pop("__metadata__", None)
    except (FileRejected, AttributeError, TypeError) as error:
        raise FileRejected(f"{name} is truncated or not a safetensors file") from error
    try:
        text = metadata["i2am"]
        document = parse_json(text, str(name))
        checksum = document.pop("checksum")
        # of the text, not of what it says: then no byte can change unseen
        plain = text.replace(f'"checksum":{checksum},', "", 1).encode()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FileRejected(f"{name} is damaged, or not a file of i2am") from error
    if checksum != zlib.crc32(plain):
        raise FileRejected(f"{name} is damaged: its description does not match its checksum")
    try:
        places = _places(entries, document["tensors"], size - start)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileRejected(f"{name} is truncated or damaged: {error}") from error
    places = {tensor: (start + begin, count) for tensor, (begin, count) in places.items()}
    return Container(document, places, str(name))


def _places(
    entries: dict[str, Any], summaries: dict[str, Any], size: int
) -> dict[str, tuple[int, int]]:
    places, end = {}, 0
    for tensor, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        summary = summaries[tensor]
        if (
            entry["shape"] != summary["shape"]
            or _BY_NAME[entry["dtype"]] != _BY_NAME[summary["dtype"]]
        ):
            raise ValueError(f"{tensor} is not as described")
        if not _is_shape(entry["shape"]) or type(summary.get("crc32")) is not int:
            raise ValueError(f"{tensor} has no shape, or no checksum")
        length = _SIZES[entry["dtype"]] * math.prod(entry["shape"])
        if entry["data_offsets"] != [end, end + length]:
            raise ValueError(f"{tensor} is not where it should be")
        places[tensor], end = (end, length), end + length
    if end != size:
        raise ValueError(f"its tensors take {end:,} bytes, and it has {size:,}")
    if missing := sorted(summaries.keys() - places.keys()):
        raise ValueError(f"{missing[0]} is missing")
    return places


def _is_shape(shape: Any) -> bool:
    """Whether a tensor can have it: its elements are counted in 64 bits, empty axes left out."""
    return (
        isinstance(shape, list)
        and len(shape) <= 64
        and all(type(size) is int and 0 <= size < 2**63 for size in shape)
        and math.prod(max(1, size) for size in shape) < 2**63
    )


def _bytes(tensor: Tensor) -> memoryview:
    # flattened first: a tensor without axes cannot be seen as bytes
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = bytearray(count)
    return bytes(data) if _fill(file, memoryview(data)) else b""


def _fill(file: BinaryIO, data: memoryview) -> bool:
    """Read until a buffer is full; False at the end of the file."""
    while data:
        count: int = file.readinto(data)  # type: ignore[attr-defined]
        if not count:
            return False
        data = data[count:]
    return True
