"""Published checkpoint files: their tensors without running a line of what is in them."""

import io
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, UntypedStorage

from i2am.memory import available_memory, readable
from i2am.models.conversion.archive import Archive, Record
from i2am.models.conversion.pickles import Attack, Storage, TensorRecord, kind_of, read_pickle
from i2am.models.file_formats import format_of
from i2am.wording import in_one_sentence

log = logging.getLogger("i2am")

# the beginning of files that torch wrote before 1.6
_MAGIC = 0x1950A86A20F9469CFC6C
LARGEST_PICKLE = 1 << 24
"""Bytes that describe all tensors; a checkpoint of Stable Diffusion with its optimizer's state has
less than a tenth of that."""


def read_checkpoint(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, most of them not read yet.

    The content says how a file is read, not its name. Tensors are mapped into memory and read when
    they are used; those that are compressed, or not aligned as their dtype needs, are read at once.
    Checksums are compared first where the format has them: in zip archives, as torch writes since
    1.6. Pickles are not executed: nothing that they name is imported or called, see `pickles`.

    Args:
        file: ``{"state_dict": tensors}``, as Lightning writes it, or tensors by name. Whatever
            stands beside "state_dict" may be of any class.

    Returns:
        Tensors by name, on the CPU; whatever else the file holds is left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged or no checkpoint, such as a Git LFS pointer or a web page; it
            names a function that runs commands; its entries are not plain tensors; what is
            compressed in it needs more memory than there is.
    """
    path = Path(file)
    what = f"checkpoint {path}"
    if not path.exists():
        raise FileNotFoundError(f"{what} does not exist")
    if not path.is_file():
        raise ValueError(f"{what} is not a file")
    found = format_of(path, what=what)
    if (found == "safetensors") != (path.suffix == ".safetensors"):
        kind = "a safetensors file" if found == "safetensors" else "a file of torch, a pickle"
        log.warning("%s is %s, and is read as one", what, kind)
    with _intact(what):
        if found == "safetensors":
            return _read_safetensors(path)
        return (_read_zip if found == "zip" else _read_legacy)(path)


class _Refused(ValueError):
    """A file is something else than a damaged checkpoint; the message says what it is."""


@contextmanager
def _intact(what: str) -> Iterator[None]:
    try:
        with in_one_sentence(f"{what} is damaged or no checkpoint"):
            yield
    except ValueError as error:
        if isinstance(error.__cause__, Attack):
            raise ValueError(
                f"{what} is refused, and nothing in it was executed: "
                f"beside tensors it names {error.__cause__}"
            ) from None
        if isinstance(error.__cause__, _Refused):
            raise ValueError(f"{what} {error.__cause__}") from None
        raise


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}
    except SafetensorError as error:
        raise _Refused(f"is truncated or no safetensors file: {error}") from error


def _read_zip(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        archive = Archive(file, what=f"checkpoint {path}")
        root = _root(list(archive.records))
        order = f"{root}/byteorder"
        known = order in archive.records
        _check_order(archive.read(order, most=100).decode() if known else "little")
        pickled = archive.read(f"{root}/data.pkl", most=LARGEST_PICKLE)
        content, storages = read_pickle(io.BytesIO(pickled))
        wanted = _records(content)

        stored: dict[str, tuple[int, int]] = {}
        packed: dict[str, Record] = {}
        for key in {record.storage.key for record in wanted.values()}:
            if f"{root}/data/{key}" not in archive.records:
                raise ValueError(f"storage {key} is missing")
            place = archive.records[f"{root}/data/{key}"]
            if place.size // storages[key].dtype.itemsize != storages[key].count:
                raise ValueError(
                    f"storage {key} has {place.size} bytes in place of "
                    f"{storages[key].count} elements"
                )
            if place.is_packed:
                packed[key] = place
            else:
                archive.check(place)
                stored[key] = (place.begin, place.size)
        found = _cut(path, stored, storages)
        _check_memory(sum(place.size for place in packed.values()))
        found |= {key: _copied(archive.unpacked(place)) for key, place in packed.items()}
    return _tensors(wanted, found)


def _root(names: list[str]) -> str:
    """The folder of a checkpoint in a zip archive."""
    if any(re.fullmatch(r"[^/]*/constants\.pkl", name) for name in names):
        raise _Refused("is a TorchScript program and no checkpoint of tensors")
    roots = [name.split("/")[0] for name in names if re.fullmatch(r"[^/]*/data\.pkl", name)]
    if len(roots) != 1:
        some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise _Refused(f"is a zip archive but no checkpoint of torch, it holds {some}")
    return roots[0]


def _read_legacy(path: Path) -> dict[str, Tensor]:
    """Five pickles (magic number, version, machine, content, order of storages), then storages."""
    with path.open("rb") as file:
        stream = io.BytesIO(file.read(LARGEST_PICKLE))
        if read_pickle(stream)[0] != _MAGIC:
            raise _Refused("is a pickle but no checkpoint of torch")
        _version, machine = (read_pickle(stream)[0] for _ in range(2))
        little = not isinstance(machine, dict) or machine.get("little_endian", True)
        _check_order("little" if little else "big")
        content, storages = read_pickle(stream)
        keys, _ = read_pickle(stream)
        places: dict[str, tuple[int, int]] = {}
        end = stream.tell()
        for key in keys:
            if not isinstance(key, str) or key not in storages or key in places:
                raise ValueError("the order of the storages names one that is not there, or twice")
            file.seek(end)
            count = int.from_bytes(file.read(8), "little")
            if count != storages[key].count:
                raise ValueError(
                    f"storage {key} has {count} elements in place of {storages[key].count}"
                )
            begin, size = end + 8, count * storages[key].dtype.itemsize
            places[key], end = (begin, size), begin + size
            if end > path.stat().st_size:
                raise ValueError("storages are cut off")
    wanted = _records(content)
    for record in wanted.values():
        if record.storage.key not in places:
            raise ValueError(f"storage {record.storage.key} is missing")
    found = _cut(path, places, storages)
    return _tensors(wanted, found)


def _cut(
    path: Path, places: Mapping[str, tuple[int, int]], storages: Mapping[str, Storage]
) -> dict[str, UntypedStorage]:
    """Pieces of a file, given by begin and size, mapped where their dtype lets them be.

    They are read when they are used; what is written to them stays in memory.
    """
    mapped: Any = UntypedStorage.from_file(os.fspath(path), False, path.stat().st_size)
    crooked = {key for key, (begin, _) in places.items() if begin % storages[key].dtype.itemsize}
    _check_memory(sum(places[key][1] for key in crooked))
    found = {}
    for key, (begin, size) in places.items():
        piece = mapped[begin : begin + size]
        found[key] = piece.clone() if key in crooked else piece
    return found


def _check_memory(needed: int) -> None:
    available = available_memory(torch.device("cpu"))
    if available is not None and needed > available:
        raise _Refused(
            f"takes {readable(needed)} of memory, because its tensors are compressed or not "
            f"aligned, {readable(available)} are available"
        )


def _copied(data: bytearray) -> UntypedStorage:
    if not data:
        return UntypedStorage(0)
    return torch.frombuffer(data, dtype=torch.uint8).untyped_storage()


def _check_order(order: str) -> None:
    if order != sys.byteorder:
        raise _Refused(f"has numbers in {order}-endian order, here it is {sys.byteorder}")


def _records(content: Any) -> dict[str, TensorRecord]:
    """What the content of a pickle says about tensors, by their names."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise _Refused(f"must hold tensors by name, got {kind_of(content)}")
    for key, value in content.items():
        if not isinstance(key, str):
            raise _Refused(
                f"must hold plain tensors by name and nothing else, a name is {kind_of(key)}"
            )
        if not isinstance(value, TensorRecord):
            raise _Refused(
                f"must hold plain tensors by name and nothing else, {key[:200]!r} is "
                f"{kind_of(value)}"
            )
    return content


def _tensors(
    wanted: Mapping[str, TensorRecord], found: Mapping[str, UntypedStorage]
) -> dict[str, Tensor]:
    """All tensors, each over its storage."""
    return {name: _tensor(record, found[record.storage.key]) for name, record in wanted.items()}


def _tensor(record: TensorRecord, found: UntypedStorage) -> Tensor:
    """A tensor over its storage. torch itself would enlarge a storage that is too small."""
    storage, size, stride, offset = record.storage, record.size, record.stride, record.offset
    steps = [(n - 1) * step for n, step in zip(size, stride, strict=True)]
    begin = storage.begin * storage.dtype.itemsize
    last = begin + (offset + sum(steps) + 1) * record.dtype.itemsize
    end = begin + storage.count * storage.dtype.itemsize
    inside = min(begin, offset, *size, *stride, 0) >= 0 and end <= found.nbytes()
    if not inside or (0 not in size and last > end):
        raise ValueError(f"a tensor of {list(size)} reaches beyond its storage {storage.key}")
    first = begin // record.dtype.itemsize + offset
    return torch.empty(0, dtype=record.dtype).set_(found, first, size, stride)
