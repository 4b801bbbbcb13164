"""Reading a data set in the layout of VITON-HD: people, their garments, and what goes with them.

In every mask of an item 1 is what is to be generated, or what shows the garment. What a pipeline
makes of an item, called with its tensors:

- Paint-by-Example: `mask` is cut at 0.5 and turned over to 1 = keep, resized to latents
  bilinearly without antialiasing. It paints `image` grey itself, with the cut mask. `garment` is
  squashed to CLIP's square, bicubic. Neither `agnostic` nor `pose`.
- DCI-VTON: the same mask; called without a size it squashes everything to the square of its UNet
  and pulls the result back. `agnostic` as it is, `warped` over it where `warped_mask` and the cut
  mask say so. `garment` is cropped to the box of `garment_mask`, which must not be empty then.
- StableVITON: the mask is cut at 0.5, turned over, and stays soft when it is resized. `agnostic`
  and `pose` as they are; the run starts from `image`.
- Custom: no mask enters, `agnostic` stands for `image` and `mask`. `pose` as it is, `garment`
  resized to the reference size of DINOv2.
"""

import json
from hashlib import sha256
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from i2am.data.images import ImageRejected, read_image, read_mask
from i2am.data.shapes import ASPECT_TOLERANCE
from i2am.data.vitonhd_files import KINDS, Files, mark_of
from i2am.data.vitonhd_pairs import DataRejected, Pair, Problem, Setting, read_pairs

__all__ = ["DataRejected", "Pair", "Problem", "VitonHD"]


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

    Pictures are resized bilinearly with a filter as wide as the reduction. A mask may be all black
    or all white: such a pair can still be generated, but no score that weighs inside against
    outside is defined on it.

    All pairs and the names of all their files are checked here, before anything else starts; what
    is in a file shows when it is read.

    Args:
        folder: The root, with ``train_pairs.txt`` and ``test_pairs.txt``.
        split: ``"train"`` or ``"test"``.
        size: Height and width of everything in an item.
        pairs: ``"paired"`` takes each person's own garment, whatever the second column says;
            ``"unpaired"`` takes the garment of the second column.
        warps: Whether items hold the warped garment, as DCI-VTON needs it.
        missing: ``"raise"`` refuses a data set that lacks files; ``"keep"`` keeps pairs without
            all of their files, and refuses them when they are read. At least one must have all.
        stretch: Whether pictures of another shape are squeezed into `size`. Else one whose
            width over height is more than 1 % off is refused when it is read.

    Attributes:
        pairs: The pairs in the order of the list.
        setting: The argument `pairs`.
        size: Height and width of everything in an item.
        names: What `path` gives the file of.
        problems: The files that are missing, for ``missing="keep"``.

    Raises:
        ValueError: If split, size, pairs or missing is none of these.
        DataRejected: If lines of the list are wrong or repeat others, there is none, files or
            folders are missing, or a file is a link that leaves the data set. It has all problems.
        FileNotFoundError: If there is no list of pairs.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str = "train",
        size: tuple[int, int] = (512, 384),
        *,
        pairs: Setting = "paired",
        warps: bool = False,
        missing: Literal["raise", "keep"] = "raise",
        stretch: bool = False,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split must be train or test, got {split!r}")
        if pairs not in get_args(Setting):
            raise ValueError(f"pairs must be paired or unpaired, got {pairs!r}")
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size must be a height and a width of at least 1, got {size}")
        if missing not in ("raise", "keep"):
            raise ValueError(f"missing must be raise or keep, got {missing!r}")
        self.size, self.setting, self.split, self.stretch = size, pairs, split, stretch
        root = Path(folder)
        self._list = f"{split}_pairs.txt"
        found, problems = read_pairs(root / self._list, pairs)
        self.pairs: tuple[Pair, ...] = tuple(found)
        names = ["image", "garment", "agnostic", "mask", "garment_mask"]
        if (root / split / "image-densepose").is_dir():
            names.append("pose")
        if pairs == "paired" and (root / split / "gt_cloth_warped_mask").is_dir():
            names.append("garment_region")
        if warps:
            names += ["warped", "warped_mask"]
        self.names = tuple(names)
        prefix = "" if pairs == "paired" else "unpaired-"
        self._files = Files(root, split, names, prefix=prefix)
        absent = self._files.find(self.pairs, self._list)
        problems = sorted([*problems, *absent], key=lambda problem: problem.line or 0)
        self.problems: tuple[Problem, ...] = tuple(problems)
        if problems and not (missing == "keep" and self._some_are_whole()):
            raise DataRejected(problems)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One pair.

        Args:
            index: From 0, in the order of the list of pairs.

        Raises:
            IndexError: If there is no such pair.
            ImageRejected: If a file is missing, no readable image or of another shape; its code
                says which, its message has the line of the pair.
        """
        item = {name: self.read(name, index) for name in self.names}
        if "pose" not in item:
            item["pose"] = torch.from_numpy(np.zeros((3, *self.size), dtype=np.float32))
        return item

    def read(self, name: str, index: int) -> Tensor:
        """One entry of an item, alone: ``[3, height, width]``, of a mask ``[height, width]``.

        Args:
            name: One of `names`.
            index: As for an item.

        Raises:
            ValueError: If the data set has no such file.
            IndexError: If there is no such pair.
            ImageRejected: As for an item.
        """
        path = self.path(name, index)
        try:
            return _read(path, name, self.size, stretch=self.stretch)
        except ImageRejected as error:
            place = f"line {self.pairs[index].line} of {self._list}"
            raise ImageRejected(f"{error} ({place})", error.code) from error

    def path(self, name: str, index: int) -> Path:
        """The file of a pair; for a missing one the name it would have in VITON-HD.

        Args:
            name: One of `names`, for example ``"image"`` or ``"garment_mask"``.
            index: As for an item.

        Raises:
            ValueError: If the data set has no such files.
            IndexError: If there is no such pair.
        """
        if name not in self.names:
            raise ValueError(f"name must be one of {', '.join(self.names)}, got {name!r}")
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}")
        return self._files.path(name, self.pairs[index])

    def digest(self, *, contents: bool = False) -> str:
        """SHA-256 of the ordered pairs and their files, wherever the data set is.

        Args:
            contents: Whether bytes of files count; else their names and sizes do.

        Returns:
            Hexadecimal digits. A missing file has its own mark, names of folders do not count.

        Raises:
            OSError: If a file cannot be read.
        """
        marks: dict[Path, int | str | None] = {}
        total = sha256(json.dumps([self.split, self.setting, self.names]).encode())
        for pair in self.pairs:
            row: list[object] = [pair.id, pair.person, pair.garment]
            for name in self.names:
                path = self._files.path(name, pair)
                if path not in marks:
                    marks[path] = mark_of(path, contents=contents)
                row += [path.name, marks[path]]
            total.update(json.dumps(row).encode())
        return total.hexdigest()

    def mask_warnings(self, count: int = 16) -> tuple[str, ...]:
        """Reads some masks and says which look inverted or are of one colour.

        Args:
            count: How many pairs to look at, spread evenly.

        Returns:
            Sentences, none where all is well; see `i2am.data.vitonhd_masks.mask_warnings`.

        Raises:
            ValueError: If the count is below 1.
        """
        from i2am.data.vitonhd_masks import mask_warnings

        return mask_warnings(self, count)

    def _some_are_whole(self) -> bool:
        """Whether files are all that is missing, and there are pairs that lack none."""
        only_files = all(problem.code == "missing" and problem.line for problem in self.problems)
        return only_files and len({problem.line for problem in self.problems}) < len(self)


def _read(path: Path, name: str, size: tuple[int, int], *, stretch: bool) -> Tensor:
    from PIL.Image import Resampling

    is_mask = KINDS[name].is_mask
    if is_mask:
        image = read_mask(path, name=name, allow_uniform=True)
    else:
        image = read_image(path, name=name)
    height, width = size
    if not stretch and abs(image.width * height / (image.height * width) - 1) > ASPECT_TOLERANCE:
        raise ImageRejected(
            f"{name} {path} must have the shape of {width} x {height} pixels to within "
            f"{ASPECT_TOLERANCE:.0%}, it has {image.width} x {image.height}; stretch allows others",
            "aspect",
        )
    image = image.resize((width, height), Resampling.BILINEAR)
    # NumPy does it all: a thread that reads while a model runs must not wake threads of torch's own
    pixels = np.array(image, dtype=np.float32) / np.float32(255)
    if not is_mask:
        pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return torch.from_numpy(pixels)
