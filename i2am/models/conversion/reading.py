"""Published checkpoint files: their tensors without running a line of what is in them."""

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from i2am.models.weights import in_one_sentence

# what training frameworks leave in checkpoints beside the tensors
STUBBED = ("pytorch_lightning.", "lightning.", "omegaconf.")


class _Inert:
    """Stands in for a class that a checkpoint names: takes every argument, does nothing."""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        return super().__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_checkpoint(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, most of them not read yet.

    safetensors files and torch's zip archives are mapped into memory, so a tensor is read when it
    is used. Files that torch wrote before 1.6 are read whole. Pickles are read with
    ``weights_only``: classes of Lightning and OmegaConf become objects without content, any other
    class or function is refused by name, nothing is executed.

    Args:
        file: ``{"state_dict": tensors}``, as Lightning writes it, or tensors by name.

    Returns:
        Tensors by name, on the CPU; whatever else the file holds is left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged or no checkpoint, names a class or function that is not known to
            be harmless, or its entries are not plain tensors.
    """
    path = Path(file)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if not path.is_file():
        raise ValueError(f"checkpoint {path} is not a file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    with path.open("rb") as stream:
        start = stream.read(4)
    # a zip archive has its directory at the end
    if not start or (start.startswith(b"PK") and not zipfile.is_zipfile(path)):
        raise ValueError(f"checkpoint {path} is truncated")
    # older files can neither be mapped nor asked for the classes they name
    content = _read_archive(path) if start.startswith(b"PK") else _load(path, mmap=False)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"checkpoint {path} must hold tensors by name, got {_kind(content)}")
    others = [key for key, value in content.items() if not _is_plain(key, value)]
    if others:
        raise ValueError(
            f"checkpoint {path} must hold plain tensors by name and nothing else, {others[0]!r} "
            f"is {_kind(content[others[0]])}"
        )
    return dict(content)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"checkpoint {path} is truncated or no safetensors file: {error}"
        ) from error


def _read_archive(path: Path) -> Any:
    with in_one_sentence(f"checkpoint {path} is damaged or no checkpoint"):
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    foreign = [name for name in named if not name.startswith(STUBBED)]
    if foreign:
        raise _refused(path, ", ".join(sorted(foreign)))
    stubs: list[Any] = [(type("Inert", (_Inert,), {}), name) for name in named]
    with torch.serialization.safe_globals(stubs):
        return _load(path, mmap=True)


def _load(path: Path, *, mmap: bool) -> Any:
    with in_one_sentence(f"checkpoint {path} is damaged or no checkpoint"):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except UnpicklingError as error:
            # torch puts advice to execute the file around its reason
            reason = str(error.__context__ or error)
    named = re.search(r"GLOBAL (\S+)", reason)
    if named:
        raise _refused(path, named[1])
    raise ValueError(f"checkpoint {path} is damaged or no checkpoint: {reason}")


def _refused(path: Path, names: str) -> ValueError:
    return ValueError(
        f"checkpoint {path} is refused, and nothing in it was executed: "
        f"beside tensors it names {names}"
    )


def _is_plain(key: Any, value: Any) -> bool:
    return (
        isinstance(key, str)
        and isinstance(value, Tensor)
        and value.layout is torch.strided
        and not value.is_quantized
        and value.device.type == "cpu"
    )


def _kind(value: Any) -> str:
    return "nothing" if isinstance(value, Mapping) and not value else f"a {type(value).__name__}"
