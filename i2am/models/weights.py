"""Weight files read strictly: damaged files are named, and so is every tensor that does not fit."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from i2am.files import read_json
from i2am.models.conversion.reading import read_checkpoint
from i2am.models.file_formats import format_of
from i2am.wording import counted, in_one_sentence

# in the order in which diffusers and transformers prefer them
WEIGHT_NAMES = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)
# tensors may share what is stored; but a small file must not keep its reader busy for ever
_SHARED, _REPEATED = 4, 1 << 20


def weight_files(folder: str | os.PathLike[str], variant: str | None = None) -> list[Path]:
    """The weight files of a component: one, or the shards that its index names, all undamaged.

    Args:
        folder: Folder of one component.
        variant: Middle part of the names, as in model.fp16.safetensors.

    Raises:
        FileNotFoundError: There is no weight file, or a shard is missing.
        ValueError: A file is truncated or otherwise no weight file, or of another format than its
            name says; there is an index beside one file of all weights.
    """
    folder = Path(folder)
    names = [_with_variant(name, variant) for name in WEIGHT_NAMES]
    indices = {
        name: _with_variant(f"{plain}.index.json", variant)
        for name, plain in zip(names, WEIGHT_NAMES, strict=True)
    }
    for name in names:
        index = folder / indices[name]
        if (folder / name).is_file() and index.is_file():
            raise ValueError(f"{folder} holds {name} and an index of others, {index.name}")
        if (folder / name).is_file():
            files = [folder / name]
        elif index.is_file():
            with in_one_sentence(f"{index} is not an index of weight files"):
                shards = sorted(set(read_json(index)["weight_map"].values()))
                if strange := [shard for shard in shards if Path(shard).name != shard]:
                    raise ValueError(f"shards must be files beside it, got {strange[0]!r}")
                files = [folder / shard for shard in shards]
        else:
            continue
        for file in files:
            _check_file(file)
        return files
    raise FileNotFoundError(f"no weights in {folder}: expected one of {', '.join(names)}")


def read_state_dict(
    folder: str | os.PathLike[str],
    variant: str | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """All tensors of a component's folder, on the CPU, in the dtypes of the files.

    Args:
        folder: Folder of one component.
        variant: Middle part of the names, as in model.fp16.safetensors.
        dtype: What they are for; None is their own.

    Raises:
        FileNotFoundError: There is no weight file, or a shard is missing.
        ValueError: A file is damaged or holds something other than tensors, two hold one tensor,
            or values are NaN, infinite or beyond the range of `dtype`.
    """
    state: dict[str, Tensor] = {}
    for file in weight_files(folder, variant):
        found, _ = read_weight_file(file, dtype=dtype)
        if twice := sorted(state.keys() & found.keys()):
            raise ValueError(f"{file} holds tensors that another shard has: {some_of(twice)}")
        state |= found
    return state


def read_weight_file(
    file: Path, *, dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of one file on the CPU, and a safetensors file's metadata.

    Files of torch are read by `read_checkpoint`, so nothing in them is executed.

    Args:
        file: Its name ends in .safetensors, or it is a file of torch.
        dtype: What the tensors are for; None is their own.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged or holds something other than tensors, or values are NaN, infinite
            or beyond the range of `dtype`.
    """
    _check_file(file)
    metadata: dict[str, str] = {}
    if file.suffix == ".safetensors":
        with in_one_sentence(f"{file} is truncated or no safetensors file"):
            with safe_open(file, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}
                metadata = opened.metadata() or {}
    else:
        tensors = read_checkpoint(file)
        values, stored = sum(x.numel() for x in tensors.values()), stored_values(tensors)
        if values > _SHARED * stored + _REPEATED:
            raise ValueError(f"{file} holds tensors of {values} values and stores {stored}")
    check_finite(
        ((name, values, dtype or values.dtype) for name, values in tensors.items()), what=str(file)
    )
    return tensors, metadata


def stored_values(state: Mapping[str, Tensor]) -> int:
    """How many numbers are stored: tensors may share them, or repeat one along an axis."""
    storages = {}
    for tensor in state.values():
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes() // tensor.itemsize
    return sum(storages.values())


def is_finite(values: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether no value is NaN or infinite, nor would be in a floating dtype."""
    if not values.is_floating_point() or not values.numel():
        return True
    # the smallest and the largest: a NaN is both. isfinite() takes fifty times as long
    ends = _computable(values).aminmax()
    return all(math.isfinite(end.to(dtype or end.dtype)) for end in ends)


def _computable(values: Tensor) -> Tensor:
    return values.float() if values.itemsize == 1 else values  # torch has little for 8 bits


def check_finite(weights: Iterable[tuple[str, Tensor, torch.dtype]], *, what: str) -> None:
    """Raises a ValueError that names weights which are not finite: images would be black.

    Args:
        weights: Name, values, and the dtype that they are for.
        what: How to call their source in an error.
    """
    broken, beyond, dtypes = [], [], set()
    for name, values, dtype in weights:
        if is_finite(values, dtype):
            continue
        among = f"of {values.numel()}"
        if is_finite(values):
            count = int((~values.to(dtype).isfinite()).sum())
            beyond.append(f"{name} ({count} {among}, up to {values.abs().max():g})")
            dtypes.add(str(dtype))
        else:
            count = int((~_computable(values).isfinite()).sum())
            broken.append(f"{name} ({count} {among})")
    problems = []
    if broken:
        problems.append(f"weights of {what} are NaN or infinite: {some_of(broken)}")
    if beyond:
        problems.append(
            f"weights are beyond the range of {', '.join(sorted(dtypes))}, "
            f"choose another dtype for {what}: {some_of(beyond)}"
        )
    if problems:
        raise ValueError("; ".join(problems))


def load_strictly(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    what: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Copies `state` into `module`.

    Args:
        module: Its parameters and persistent buffers must be exactly those of `state`.
        state: Tensors by name.
        what: How to call it in an error.
        dtype: Floating dtype of what the module has without values, on torch's meta; other
            parameters keep theirs.

    Raises:
        ValueError: Tensors are missing, left over or misshapen, or whole numbers in place of
            floating ones; all are counted, some named.
    """
    expected = module.state_dict()
    both = [(key, state[key], expected[key]) for key in expected if key in state]
    misshapen = [
        f"{key} ({list(found.shape)} for {list(wanted.shape)})"
        for key, found, wanted in both
        if found.shape != wanted.shape
    ] + [
        f"{key} ({found.dtype} for {wanted.dtype})"
        for key, found, wanted in both
        if found.is_floating_point() != wanted.is_floating_point()
    ]
    check_keys(
        what,
        missing=[key for key in expected if key not in state],
        unexpected=[key for key in state if key not in expected],
        misshapen=misshapen,
    )
    empty = {key: own_copy(state[key], dtype) for key, values in expected.items() if values.is_meta}
    module.load_state_dict(empty, strict=False, assign=True)
    module.load_state_dict({key: state[key] for key in expected if key not in empty}, strict=False)


def own_copy(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in memory, in a dtype if they are floating: what is read from a file may be mapped."""
    return values.to(dtype if values.is_floating_point() else values.dtype, copy=True)


def check_keys(
    what: str, *, missing: Iterable[str], unexpected: Iterable[str], misshapen: Iterable[str]
) -> None:
    """Raises a ValueError that lists what is wrong with a set of weights, if anything is."""
    found = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    groups = {name: sorted(keys) for name, keys in found.items()}
    problems = [f"{name}: {some_of(keys)}" for name, keys in groups.items() if keys]
    if problems:
        raise ValueError(f"the weights of the {what} do not fit; {'; '.join(problems)}")


def some_of(keys: Sequence[str], limit: int = 8) -> str:
    """How many tensors there are, and the names of the first."""
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return f"{counted(len(keys), 'tensor')}, {', '.join(keys[:limit])}{more}"


def _with_variant(name: str, variant: str | None) -> str:
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}" if variant else name


def _check_file(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    found = format_of(file, what=str(file))
    if found != "safetensors" and file.suffix != ".safetensors":
        return
    # libraries go by the name
    if found != "safetensors":
        raise ValueError(f"{file} is a file of torch, a pickle, and not what its name says")
    if file.suffix != ".safetensors":
        raise ValueError(f"{file} is a safetensors file; its name has to end in .safetensors")
    try:
        with safe_open(file, framework="pt"):
            return
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or no safetensors file: {error}") from error
