"""Pictures as the metrics get them: 8-bit RGB tensors, resized as a protocol says."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from i2am.data.vitonhd_pairs import file_names, stem_of
from i2am.evaluation.scores.protocols import Resize

if TYPE_CHECKING:
    from PIL.Image import Image


def find_picture(folder: Path, name: str) -> Path:
    """The file of a picture that may have another format in this folder.

    Args:
        folder: Where it lies.
        name: Its file name in the data set.

    Returns:
        The file of that name, or else the first of `file_names`; a path that does not exist if
        there is none.
    """
    candidates = [folder / file for file in file_names(stem_of(name), name)]
    return next((path for path in candidates if path.is_file()), candidates[0])


def to_pixels(image: "Image") -> Tensor:
    """uint8 ``[channels, height, width]`` of a PIL image of mode RGB or L."""
    import numpy as np

    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def resize(pixels: Tensor, size: tuple[int, int], how: Resize) -> Tensor:
    """Resized and rounded to 8 bits.

    Args:
        pixels: uint8 ``[3, height, width]``.
        size: Height and width wanted.
        how: One of the names of :data:`~i2am.evaluation.scores.protocols.Resize`.

    Returns:
        uint8 ``[3, *size]``; `pixels` itself if it has that size.
    """
    if tuple(pixels.shape[-2:]) == tuple(size):
        return pixels
    if how == "bilinear":
        resized = functional.interpolate(
            pixels[None].float(), size, mode="bilinear", align_corners=False, antialias=False
        )
        return resized[0].round().to(torch.uint8)
    from PIL.Image import Resampling

    height, width = size
    filter_name = how.removeprefix("pil-").upper()
    return to_pixels(to_image(pixels).resize((width, height), Resampling[filter_name]))


def grey(pixels: Tensor) -> Tensor:
    """uint8 ``[1, height, width]``: Pillow's grey values of ``[3, height, width]``."""
    return to_pixels(to_image(pixels).convert("L"))


def to_image(pixels: Tensor) -> "Image":
    """The PIL image of uint8 ``[3, height, width]``."""
    from PIL import Image

    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
