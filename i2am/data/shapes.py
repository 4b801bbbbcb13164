"""Masks that belong to a picture: whether their shapes fit, and what a box shows of both."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

ASPECT_TOLERANCE = 0.01
"""How far width over height of a mask may be off its picture's, as a fraction."""


def require_size(name: str, size: tuple[int, ...], of: str, wanted: tuple[int, ...]) -> None:
    """Refuses a mask that has not its picture's size, both (height, width).

    Args:
        name: What the caller calls the mask.
        size: Its size.
        of: What the caller calls the picture.
        wanted: The picture's size.

    Raises:
        ValueError: They differ; names height and width swapped where that is the likely reason.
    """
    _require(name, size, f"the size of {of}", wanted, lambda *found: found == tuple(wanted))


def require_shape(
    name: str, size: tuple[int, int], of: str, wanted: tuple[int, int], *, options: str = ""
) -> None:
    """Refuses a mask whose width over height is more than 1 % off its picture's.

    Args:
        name, size, of, wanted: As for `require_size`.
        options: What to say of options that accept it.

    Raises:
        ValueError: As `require_size`.
    """

    def fits(height: int, width: int) -> bool:
        return abs(width * wanted[0] / (height * wanted[1]) - 1) <= ASPECT_TOLERANCE

    what = f"the shape of {of} to within {ASPECT_TOLERANCE:.0%}"
    _require(name, size, what, wanted, fits, options)


def require_grid(
    name: str, size: tuple[int, int], of: str, grid: tuple[int, int], *, options: str = ""
) -> None:
    """Refuses a mask whose shape is more than a cell off that of a grid, whose sides were rounded.

    Args:
        name, size, of, options: As for `require_shape`.
        grid: (height, width) in cells.

    Raises:
        ValueError: As `require_size`.
    """

    def fits(height: int, width: int) -> bool:
        low = max((cells - 1) / side for cells, side in zip(grid, (height, width), strict=True))
        high = min((cells + 1) / side for cells, side in zip(grid, (height, width), strict=True))
        return low < high

    _require(name, size, f"the shape of {of}", grid, fits, options)


def _require(
    name: str,
    size: tuple[int, ...],
    what: str,
    wanted: tuple[int, ...],
    fits: Callable[[int, int], bool],
    options: str = "",
) -> None:
    height, width = size
    if fits(height, width):
        return
    swapped = ": height and width look swapped" if fits(width, height) else ""
    raise ValueError(
        f"{name} must have {what}, {wanted[0]} x {wanted[1]} (height x width), "
        f"got {height} x {width}{swapped}{options}"
    )


def cut_mask(mask: Tensor, box: tuple[float, float, float, float]) -> Tensor:
    """The part of masks inside a box, each pixel the mean of what it covers; 0 beyond the picture.

    Args:
        mask: ``[masks, height, width]``.
        box: Top, left, height and width as fractions of the picture.

    Returns:
        ``[masks, rows, columns]`` in the mask's dtype, of about as many pixels per picture.
    """
    height, width = mask.shape[-2:]
    rows = _covered(height, box[0] * height, box[2] * height)
    columns = _covered(width, box[1] * width, box[3] * width)
    found = rows.to(mask.device) @ mask.double() @ columns.to(mask.device).mT
    return found.clamp(0, 1).to(mask.dtype)


def cut_picture(image: "Image", box: tuple[float, float, float, float]) -> "Image":
    """The part of a picture inside a box of fractions, see `cut_mask`; black beyond it."""
    top, left = box[0] * image.height, box[1] * image.width
    bottom, right = top + box[2] * image.height, left + box[3] * image.width
    return image.crop((round(left), round(top), round(right), round(bottom)))


def _covered(pixels: int, start: float, length: float) -> Tensor:
    """fp64 ``[cells, pixels]``: equal cells of an interval as means of the pixels below."""
    edges = start + length * torch.linspace(0, 1, max(round(length), 1) + 1, dtype=torch.float64)
    first = torch.arange(pixels, dtype=torch.float64)
    overlap = edges[1:, None].minimum(first + 1) - edges[:-1, None].maximum(first)
    return overlap.clamp(min=0) / (edges[1] - edges[0])
