"""Published checkpoint files: their tensors without running a line of what is in them."""

import io
import logging
import os
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, UntypedStorage

from i2am.models.conversion.pickles import Attack, Placeholder, Storage, TensorRecord, Unpickler
from i2am.models.file_formats import format_of
from i2am.models.weights import in_one_sentence

log = logging.getLogger("i2am")

# the beginning of files that torch wrote before 1.6
_MAGIC = 0x1950A86A20F9469CFC6C
_LOCAL_HEADER = 30  # bytes in front of the name of a member of a zip archive

_Find = Callable[[Storage], UntypedStorage]


def read_checkpoint(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, most of them not read yet.

    The content says how a file is read, not its name. Tensors are mapped into memory and read when
    they are used; those that are compressed, or not aligned as their dtype needs, are read at once.
    Pickles are not executed: nothing that they name is imported or called, see `pickles`.

    Args:
        file: ``{"state_dict": tensors}``, as Lightning writes it, or tensors by name. Whatever
            stands beside "state_dict" may be of any class.

    Returns:
        Tensors by name, on the CPU; whatever else the file holds is left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged or no checkpoint, such as a Git LFS pointer or a web page; it
            names a function that runs commands; its entries are not plain tensors.
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
    if found == "safetensors":
        return _read_safetensors(path)
    return (_read_zip if found == "zip" else _read_legacy)(path, what)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"checkpoint {path} is truncated or no safetensors file: {error}"
        ) from error


def _read_zip(path: Path, what: str) -> dict[str, Tensor]:
    damaged = f"{what} is damaged or no checkpoint"
    with in_one_sentence(damaged):
        archive = zipfile.ZipFile(path)
    with archive, path.open("rb") as file:
        root = _root(archive, what)
        with in_one_sentence(damaged):
            pickled = archive.read(f"{root}/data.pkl")
            members = {info.filename: info for info in archive.infolist()}
            order = f"{root}/byteorder"
            _check_order(archive.read(order).decode() if order in members else "little", what)
            whole = _mapped(path)
        content = _unpickled(Unpickler(io.BytesIO(pickled)), what)

        def find(storage: Storage) -> UntypedStorage:
            member = members.get(f"{root}/data/{storage.key}")
            if member is None:
                raise ValueError(f"storage {storage.key} is missing")
            encrypted = member.flag_bits & 1
            if member.compress_type == zipfile.ZIP_STORED and not encrypted:
                begin = _begin(file, member)
                return _cut(whole, begin, member.file_size, storage)
            return _copied(archive.read(member))

        return _tensors(content, find, what)


def _root(archive: zipfile.ZipFile, what: str) -> str:
    """The folder of a checkpoint in a zip archive."""
    names = archive.namelist()
    if any(re.fullmatch(r"[^/]*/constants\.pkl", name) for name in names):
        raise ValueError(f"{what} is a TorchScript program and no checkpoint of tensors")
    roots = [name.split("/")[0] for name in names if re.fullmatch(r"[^/]*/data\.pkl", name)]
    if len(roots) != 1:
        some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ValueError(f"{what} is a zip archive but no checkpoint of torch, it holds {some}")
    return roots[0]


def _begin(file: IO[bytes], member: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin: behind a header that the directory does not show."""
    file.seek(member.header_offset)
    header = file.read(_LOCAL_HEADER)
    lengths = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return member.header_offset + _LOCAL_HEADER + sum(lengths)


def _read_legacy(path: Path, what: str) -> dict[str, Tensor]:
    """Five pickles (magic number, version, machine, content, order of storages), then storages."""
    with path.open("rb") as file:
        if _unpickled(Unpickler(file), what) != _MAGIC:
            raise ValueError(f"{what} is a pickle but no checkpoint of torch")
        _version, machine = (_unpickled(Unpickler(file), what) for _ in range(2))
        little = not isinstance(machine, Mapping) or machine.get("little_endian", True)
        _check_order("little" if little else "big", what)
        unpickler = Unpickler(file)
        content = _unpickled(unpickler, what)
        keys = _unpickled(Unpickler(file), what)
        places: dict[str, tuple[int, int]] = {}
        with in_one_sentence(f"{what} is damaged or no checkpoint"):
            for key in keys:
                count = int.from_bytes(file.read(8), "little")
                size = count * unpickler.storages[key].dtype.itemsize
                places[key] = (file.tell(), size)
                file.seek(size, os.SEEK_CUR)
            if file.tell() > path.stat().st_size:
                raise ValueError("storages are cut off")
            whole = _mapped(path)

        def find(storage: Storage) -> UntypedStorage:
            if storage.key not in places:
                raise ValueError(f"storage {storage.key} is missing")
            return _cut(whole, *places[storage.key], storage)

        return _tensors(content, find, what)


def _mapped(path: Path) -> UntypedStorage:
    """The bytes of a file, read when they are used; what is written to them stays in memory."""
    storage: Any = UntypedStorage.from_file(os.fspath(path), False, path.stat().st_size)
    return storage


def _cut(whole: UntypedStorage, begin: int, size: int, storage: Storage) -> UntypedStorage:
    if begin + size > whole.nbytes():
        raise ValueError(f"storage {storage.key} is cut off")
    cut = whole[begin : begin + size]
    return cut if begin % storage.dtype.itemsize == 0 else cut.clone()


def _copied(data: bytes) -> UntypedStorage:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).untyped_storage()


def _check_order(order: str, what: str) -> None:
    if order != sys.byteorder:
        raise ValueError(f"{what} has numbers in {order}-endian order, here it is {sys.byteorder}")


def _unpickled(unpickler: Unpickler, what: str) -> Any:
    try:
        with in_one_sentence(f"{what} is damaged or no checkpoint"):
            return unpickler.load()
    except MemoryError:
        # the pickle is small, its tensors are not in it: a length in it makes no sense
        raise ValueError(f"{what} is damaged or no checkpoint") from None
    except ValueError as error:
        if isinstance(error.__cause__, Attack):
            raise ValueError(
                f"{what} is refused, and nothing in it was executed: "
                f"beside tensors it names {error.__cause__}"
            ) from None
        raise


def _tensors(content: Any, find: _Find, what: str) -> dict[str, Tensor]:
    """The tensors that the content of a pickle describes, each found in its storage."""
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{what} must hold tensors by name, got {_kind(content)}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, TensorRecord):
            raise ValueError(
                f"{what} must hold plain tensors by name and nothing else, {key!r} is "
                f"{_kind(value)}"
            )
    storages: dict[str, UntypedStorage] = {}
    tensors = {}
    with in_one_sentence(f"{what} is damaged or no checkpoint"):
        for key, record in content.items():
            storage = record.storage
            if storage.key not in storages:
                storages[storage.key] = find(storage)
            tensors[key] = _tensor(record, storages[storage.key])
    return tensors


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


def _kind(value: Any) -> str:
    if isinstance(value, Mapping) and not value:
        return "nothing"
    if isinstance(value, TensorRecord):
        return "a tensor"
    if isinstance(value, Placeholder):
        return f"an object of {type(value).__module__}.{type(value).__name__}"
    return f"a {type(value).__name__}"
