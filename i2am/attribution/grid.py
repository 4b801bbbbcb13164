"""Token grids, the regions people point at on them, and resizing between them."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]
"""Height and width in tokens."""

ResizeMode = Literal["bilinear", "bicubic", "area", "nearest"]


@dataclass(frozen=True)
class Patch:
    """One cell of a grid laid over the generated image.

    The grid need not be a layer's own: on every layer the patch becomes the part of that layer's
    grid which it covers.

    Args:
        row: 0-based row, top first.
        column: 0-based column, left first.
        grid: ``(height, width)`` of the grid the cell is counted on.

    Raises:
        ValueError: If the grid is empty or the cell lies outside it.

    Example:
        >>> str(Patch(3, 4, (32, 24)))
        '3,4@32x24'
    """

    row: int
    column: int
    grid: Grid

    def __post_init__(self) -> None:
        height, width = self.grid
        if height < 1 or width < 1:
            raise ValueError(f"grid must be at least 1x1, got {height}x{width}")
        if not (0 <= self.row < height and 0 <= self.column < width):
            raise ValueError(
                f"row and column must lie on the {height}x{width} grid, "
                f"got row {self.row}, column {self.column}"
            )

    def __str__(self) -> str:
        return f"{self.row},{self.column}@{self.grid[0]}x{self.grid[1]}"


Region = Patch | Tensor
"""A :class:`Patch`, or weights ``[height, width]`` >= 0 over the generated image at any size."""


def resize(maps: Tensor, size: Grid, *, mode: ResizeMode = "bilinear") -> Tensor:
    """Resizes the last two axes; every mode is linear in the maps and keeps a constant constant.

    Pixels are areas (``align_corners=False``) and no mode applies an antialiasing filter, except
    ``"area"``, which is one: each target cell is the exact mean of the source area it covers, also
    where the sizes do not divide.

    Args:
        maps: ``[..., height, width]``, any real dtype.
        size: Target ``(height, width)``.
        mode: ``"bilinear"``, ``"bicubic"`` (may leave the range of the input), ``"area"`` or
            ``"nearest"`` (the source cell under the target cell's centre).

    Returns:
        ``[..., *size]``, fp64 for fp64 input and fp32 otherwise.

    Raises:
        ValueError: If `maps` has fewer than two axes or an empty grid, `size` is not positive, or
            `mode` is unknown.
    """
    if maps.ndim < 2 or 0 in maps.shape[-2:]:
        raise ValueError(f"maps must be [..., height, width], not empty, got {list(maps.shape)}")
    if min(size) < 1:
        raise ValueError(f"size must be at least 1x1, got {size[0]}x{size[1]}")
    if mode not in ("bilinear", "bicubic", "area", "nearest"):
        raise ValueError(f"mode must be bilinear, bicubic, area or nearest, got {mode!r}")
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    height, width = maps.shape[-2:]
    if (height, width) == tuple(size):
        return maps
    if mode == "area":
        rows = _area_weights(height, size[0], maps)
        columns = _area_weights(width, size[1], maps)
        return rows @ maps @ columns.mT
    flat = maps.reshape(1, math.prod(maps.shape[:-2]), height, width)
    if flat.shape[1] == 0:
        return maps.new_empty(*maps.shape[:-2], *size)
    if mode == "nearest":
        flat = F.interpolate(flat, size=size, mode="nearest-exact")
    else:
        flat = F.interpolate(flat, size=size, mode=mode, align_corners=False)
    return flat.reshape(*maps.shape[:-2], *size)


def region_weights(region: Region, grid: Grid) -> Tensor:
    """The region as a probability over the cells of a grid: one weight row of ``W P``.

    Args:
        region: A :class:`Patch` or weights ``[height, width]`` >= 0 over the generated image.
        grid: Generated grid ``(height, width)`` of a layer.

    Returns:
        fp32 ``[height * width]`` on the region's device, area-resized, summing to 1.

    Raises:
        ValueError: If the weights are not ``[height, width]``, are negative or not finite, or are
            zero everywhere.
    """
    if isinstance(region, Patch):
        weights = torch.zeros(region.grid, dtype=torch.float64)
        weights[region.row, region.column] = 1
    else:
        weights = region.double()
        if weights.ndim != 2:
            raise ValueError(f"region must be [height, width], got {list(weights.shape)}")
        if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
            raise ValueError(
                "region must hold finite weights >= 0, got negative or non-finite ones"
            )
        if not bool((weights > 0).any()):
            raise ValueError("region must hold at least one weight > 0, got only zeros")
    weights = resize(weights / weights.max(), grid, mode="area").flatten()
    return (weights / weights.sum()).float()


def mask_weights(mask: Tensor, grid: Grid) -> Tensor:
    """A mask on a grid, each cell the share of it that the mask covers; not normalised.

    Args:
        mask: ``[height, width]`` or ``[batch, height, width]`` in [0, 1], bool or any real dtype.
        grid: Target ``(height, width)``.

    Returns:
        fp32 ``[cells]`` or ``[batch, cells]`` in [0, 1] on the mask's device.

    Raises:
        ValueError: If `mask` has another number of axes or holds a value outside [0, 1].
    """
    if mask.ndim not in (2, 3):
        raise ValueError(
            f"mask must be [height, width] or [batch, height, width], got {list(mask.shape)}"
        )
    # written so that NaN fails too
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError("mask must hold values in [0, 1], got values outside")
    return resize(mask.double(), grid, mode="area").flatten(-2).float()


def _area_weights(source: int, target: int, like: Tensor) -> Tensor:
    """Box-overlap matrix ``[target, source]`` whose rows sum to 1."""
    # counted in 1 / (source * target), where every edge is a whole number and overlaps are exact
    start = torch.arange(target, device=like.device)[:, None] * source
    cell = torch.arange(source, device=like.device)[None, :] * target
    overlap = (start + source).minimum(cell + target) - start.maximum(cell)
    return overlap.clamp(min=0).to(like.dtype) / source
