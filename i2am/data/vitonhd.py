"""Reading a data set in the layout of VITON-HD: people, their garments, and what goes with them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from i2am.data.images import ImageRejected, read_image

Pairs = Literal["paired", "unpaired"]


_MASKS = ("mask", "garment_mask", "garment_region", "warped_mask")


class _Pair(NamedTuple):
    person: str  # stems of file names
    garment: str
    place: str  # where it was read, for errors


class VitonHD(torch.utils.data.Dataset[dict[str, Tensor]]):
    """People and garments of one split; each item has the names of `i2am.data.paper_doll.Scenes`.

    An item holds fp32 tensors in [0, 1]:

    - ``image``, ``agnostic``, ``pose``, ``garment``: ``[3, height, width]``. The pose is black
      where the data set has no folder ``image-densepose``.
    - ``mask`` (1 = to generate) and ``garment_mask``: ``[height, width]``. Masks are thresholded
      at 128 of 255 in their own size, then resized, so edges are soft.
    - ``garment_region``: the same, for pairs of a person and its own garment where the data set
      has a folder ``gt_cloth_warped_mask``: VITON-HD has it in its training split only.
    - With `warps`: ``warped`` ``[3, height, width]``, the garment as a warp network has laid it on
      the person, and ``warped_mask`` ``[height, width]``, of the folders ``cloth-warp`` and
      ``cloth-warp-mask``, for unpaired garments ``unpaired-cloth-warp`` and
      ``unpaired-cloth-warp-mask``, all under the person's name.

    Pictures are resized bilinearly with a filter as wide as the reduction.

    Args:
        folder: The root, with ``train_pairs.txt`` and ``test_pairs.txt``.
        split: ``"train"`` or ``"test"``.
        size: Height and width of everything in an item.
        pairs: ``"paired"`` takes each person's own garment, whatever the second column says;
            ``"unpaired"`` takes the garment of the second column.
        warps: Whether items hold the warped garment, as DCI-VTON needs it.

    Raises:
        ValueError: If split, size or pairs is none of these, a line of the pairs is not two file
            names, or there is no line.
        FileNotFoundError: If the list of pairs, a file that one of its lines needs or a folder of
            warped garments is missing.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str = "train",
        size: tuple[int, int] = (512, 384),
        *,
        pairs: Pairs = "paired",
        warps: bool = False,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split must be train or test, got {split!r}")
        if pairs not in get_args(Pairs):
            raise ValueError(f"pairs must be paired or unpaired, got {pairs!r}")
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size must be a height and a width of at least 1, got {size}")
        self.size = size
        self.pairs = list(_read_pairs(Path(folder) / f"{split}_pairs.txt", pairs))
        self._root = root = Path(folder) / split
        # the folder has both names: in the archive, and in the instructions of StableVITON
        names = ("agnostic-v3.2", "agnostic")
        self._agnostic = next((name for name in names if (root / name).is_dir()), names[0])
        self._has_pose = (root / "image-densepose").is_dir()
        self._has_region = pairs == "paired" and (root / "gt_cloth_warped_mask").is_dir()
        self._warps = None
        if warps:
            self._warps = "cloth-warp" if pairs == "paired" else "unpaired-cloth-warp"
            for folder in (root / self._warps, root / f"{self._warps}-mask"):
                if not folder.is_dir():
                    raise FileNotFoundError(
                        f"{folder} is missing: garments are warped by a network such as PF-AFN, "
                        "which is not part of i2am"
                    )
        self._check_files()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One pair.

        Args:
            index: From 0, in the order of the list of pairs.

        Raises:
            IndexError: If there is no such pair.
            ImageRejected: If a file is no readable image; the message has the line of the pair.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}")
        pair = self.pairs[index]
        item = {}
        for name, path in self._files(pair).items():
            try:
                is_mask = name in _MASKS
                item[name] = _read(path, name, self.size, is_mask=is_mask)
            except ImageRejected as error:
                raise ImageRejected(f"{error} ({pair.place})") from error
        item.setdefault("pose", torch.zeros(3, *self.size))
        return item

    def _files(self, pair: _Pair) -> dict[str, Path]:
        person, garment = f"{pair.person}.jpg", f"{pair.garment}.jpg"
        files = {
            "image": self._root / "image" / person,
            "garment": self._root / "cloth" / garment,
            "agnostic": self._root / self._agnostic / person,
            "mask": self._root / "agnostic-mask" / f"{pair.person}_mask.png",
            "garment_mask": self._root / "cloth-mask" / garment,
        }
        if self._has_pose:
            files["pose"] = self._root / "image-densepose" / person
        if self._has_region:
            files["garment_region"] = self._root / "gt_cloth_warped_mask" / person
        if self._warps is not None:
            files["warped"] = self._root / self._warps / person
            files["warped_mask"] = self._root / f"{self._warps}-mask" / person
        return files

    def _check_files(self) -> None:
        # now, not hours into a training; one listing of each folder instead of a call for each file
        there: dict[Path, set[str]] = {}
        for pair in self.pairs:
            for path in self._files(pair).values():
                folder = path.parent
                if folder not in there:
                    listed = folder.iterdir() if folder.is_dir() else ()
                    there[folder] = {file.name for file in listed}
                if path.name not in there[folder]:
                    raise FileNotFoundError(f"{path} is missing, {pair.place} needs it")


def _read_pairs(path: Path, pairs: Pairs) -> Iterator[_Pair]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a VITON-HD folder lists its pairs there")
    lines = path.read_text(encoding="utf-8").splitlines()
    if not any(line.strip() for line in lines):
        raise ValueError(f"{path} must list at least one pair, it is empty")
    for number, line in enumerate(lines, start=1):
        names = line.split()
        if not names:
            continue
        # a name with a folder in it could leave the data set
        if len(names) != 2 or any(Path(name).name != name or "\\" in name for name in names):
            raise ValueError(
                f"line {number} of {path} must be two file names, a person's and a garment's, "
                f"got {line!r}"
            )
        person, garment = (Path(name).stem for name in names)
        own = pairs == "paired"
        yield _Pair(person, person if own else garment, f"line {number} of {path.name}")


def _read(path: Path, name: str, size: tuple[int, int], *, is_mask: bool) -> Tensor:
    from PIL.Image import Resampling

    image = read_image(path, name=name)
    if is_mask:
        image = image.convert("L").point([0] * 128 + [255] * 128)
    height, width = size
    image = image.resize((width, height), Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).float() / 255
    return pixels if is_mask else pixels.permute(2, 0, 1).contiguous()
