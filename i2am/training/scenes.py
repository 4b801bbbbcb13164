"""Training scenes from either source, as batches of fp32 tensors, and a cache of them on disk."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from i2am.files import canonical, read_json, replaced_folder, write

PICTURES = ("image", "garment", "agnostic", "pose")
CHUNK = 32
READY = "ready.json"


class SceneSource(Protocol):
    """Scenes by index. Every tensor of a batch is fp32 with values in [0, 1].

    `image`, `agnostic`, `pose` are ``[batch, 3, height, width]``, `garment` is
    ``[batch, 3, reference height, reference width]``, `mask` and, where it is known,
    `garment_region` are ``[batch, height, width]``.
    """

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The scenes at `indices` as one batch."""
        ...


class PaperDollScenes:
    """Scenes of the generator in `i2am.data.paper_doll`.

    Args:
        count: Number of scenes.
        split: "train" or "test".
    """

    names = (*PICTURES, "mask", "garment_region")

    def __init__(self, count: int, split: str = "train") -> None:
        self.count, self.split = count, split

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The scenes at `indices` as one batch."""
        from i2am.data.paper_doll import render

        scenes = render(indices, split=self.split)
        return {name: getattr(scenes, name).float() for name in self.names}


class FolderScenes:
    """Scenes of a folder in VITON-HD layout, each person with the garment it wears.

    Args:
        folder: Its root.
        split: "train" or "test".
        size: (height, width) of all pictures in pixels.
        count: How many of its first scenes to use, None for all.

    Raises:
        FileNotFoundError: A file that the list of pairs names is missing.
        ValueError: There are fewer scenes than `count`, or the list is malformed.
    """

    names = (*PICTURES, "mask")

    def __init__(
        self, folder: Path, split: str, size: tuple[int, int], count: int | None = None
    ) -> None:
        from i2am.data.vitonhd import VitonHD

        self.items = VitonHD(folder, split, size, stretch=True)
        if count is not None and count > len(self.items):
            raise ValueError(f"scenes must be at most {len(self.items)} for {folder}, got {count}")
        self.count = len(self.items) if count is None else count

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The scenes at `indices` as one batch."""
        items = [self.items[index] for index in indices]
        names = [*self.names, *(["garment_region"] if "garment_region" in items[0] else [])]
        return {name: torch.stack([item[name] for item in items]) for name in names}


class CachedScenes:
    """Scenes that lie in memory-mapped uint8 arrays, one file per name.

    Args:
        arrays: ``[scenes, ...]`` by name; 255 stands for 1.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = dict(arrays)

    def __len__(self) -> int:
        return len(self.arrays["image"])

    def read(self, indices: Sequence[int], names: Iterable[str] = ()) -> dict[str, Tensor]:
        """The scenes at `indices` as one batch; only what is named, where anything is."""
        picked = np.asarray(indices)
        return {name: from_bytes(self.arrays[name][picked]) for name in names or self.arrays}


def cached_scenes(
    source: SceneSource,
    folder: Path,
    key: Mapping[str, object],
    workers: int,
    *,
    progress: bool,
) -> CachedScenes:
    """All scenes of `source`, rendered once into `folder` by `workers` processes."""

    def batches() -> Iterator[dict[str, np.ndarray]]:
        with tqdm(total=len(source), desc="scenes", unit="scene", disable=not progress) as bar:
            for batch in chunks(source, workers):
                yield {name: to_bytes(values) for name, values in batch.items()}
                bar.update(len(batch["image"]))

    return CachedScenes(cached_arrays(folder, key, len(source), batches))


def cached_arrays(
    folder: Path,
    key: Mapping[str, object],
    count: int,
    batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
) -> dict[str, np.ndarray]:
    """Arrays on disk, made anew unless `folder` holds finished ones of the same key.

    Args:
        folder: Where they are kept, one .npy file each. It appears complete or not at all.
        key: Plain values that decide the content.
        count: Length of the first axis of every array.
        batches: Yields the content in order, slice by slice.

    Returns:
        Memory-mapped arrays by name.
    """
    if not _finished(folder / READY, key):
        with replaced_folder(folder) as partial:
            arrays: dict[str, np.memmap] = {}
            start = 0
            for batch in batches():
                for name, values in batch.items():
                    if name not in arrays:
                        arrays[name] = np.lib.format.open_memmap(
                            partial / f"{name}.npy",
                            mode="w+",
                            dtype=values.dtype,
                            shape=(count, *values.shape[1:]),
                        )
                    arrays[name][start : start + len(values)] = values
                start += len(values)
            for array in arrays.values():
                array.flush()
            write(partial / READY, canonical(dict(key)))
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}


def _finished(marker: Path, key: Mapping[str, object]) -> bool:
    try:
        return bool(read_json(marker) == dict(key))
    except (FileNotFoundError, ValueError):
        return False


def chunks(source: SceneSource, workers: int) -> Iterator[dict[str, Tensor]]:
    """The scenes of `source` in order, `CHUNK` at a time, read by `workers` processes."""
    yield from DataLoader(_Chunks(source), batch_size=None, num_workers=workers)


def to_bytes(values: Tensor) -> np.ndarray:
    """Values in [0, 1] as uint8, rounded."""
    return (values * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def from_bytes(values: np.ndarray) -> Tensor:
    """The inverse of `to_bytes`, fp32."""
    return torch.from_numpy(values).float().div_(255)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of named tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class _Chunks(Dataset[dict[str, Tensor]]):
    def __init__(self, source: SceneSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return -(-len(self.source) // CHUNK)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= len(self):
            raise IndexError(index)
        end = min(len(self.source), (index + 1) * CHUNK)
        return self.source.read(range(index * CHUNK, end))
