"""Token grids, the regions people point at on them, and resizing between them."""

import math
import zlib
from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class Box:
    """A rectangle of pixels of the generated image.

    On every layer it becomes the part of that layer's grid which it covers, cells on its border in
    proportion.

    Args:
        top, left: 0-based pixel of the upper left corner.
        height, width: Extent in pixels, at least 1.
        size: ``(height, width)`` in pixels of the image the rectangle is counted on.

    Raises:
        ValueError: If the image or the rectangle is empty, or it reaches outside the image.

    Example:
        >>> str(Box(128, 96, 64, 32, (512, 384)))
        '128,96,64,32@512x384'
    """

    top: int
    left: int
    height: int
    width: int
    size: Grid

    def __post_init__(self) -> None:
        rows, columns = self.size
        if rows < 1 or columns < 1:
            raise ValueError(f"size must be at least 1x1, got {rows}x{columns}")
        if self.height < 1 or self.width < 1:
            raise ValueError(
                f"height and width must be at least 1, got height {self.height}, width {self.width}"
            )
        inside = self.top >= 0 and self.left >= 0
        if not inside or self.top + self.height > rows or self.left + self.width > columns:
            raise ValueError(
                f"the box must lie on the {rows}x{columns} image, got rows {self.top} to "
                f"{self.top + self.height}, columns {self.left} to {self.left + self.width}"
            )

    def __str__(self) -> str:
        corner_and_extent = f"{self.top},{self.left},{self.height},{self.width}"
        return f"{corner_and_extent}@{self.size[0]}x{self.size[1]}"


Region = Patch | Box | Tensor
"""A :class:`Patch`, a :class:`Box`, or weights ``[height, width]`` >= 0 over the generated image at
any size."""


def as_regions(regions: Mapping[str, Region] | Sequence[Patch | Box] | None) -> dict[str, Region]:
    """Regions by name; those of a sequence are called what :func:`str` makes of them.

    Args:
        regions: Regions by name, or a sequence of :class:`Patch` and :class:`Box`. None is none.

    Returns:
        A new dict in the order given.

    Raises:
        ValueError: If something is not a region, a sequence repeats one, or weights come without a
            name.

    Example:
        >>> as_regions([Patch(3, 4, (32, 24))])
        {'3,4@32x24': Patch(row=3, column=4, grid=(32, 24))}
    """
    if regions is None:
        return {}
    if isinstance(regions, Mapping):
        for name, region in regions.items():
            if not isinstance(region, Region):
                raise ValueError(
                    f"regions must be Patch, Box or tensor, got {type(region).__name__} "
                    f"under {name!r}"
                )
        return dict(regions)
    if not isinstance(regions, Sequence):
        raise ValueError(
            "regions must be a mapping from names or a sequence of Patch and Box, "
            f"got {type(regions).__name__}"
        )
    named: dict[str, Region] = {}
    for region in regions:
        if not isinstance(region, Patch | Box):
            raise ValueError(
                "regions without names must be Patch or Box (give weights as {name: weights}), "
                f"got {type(region).__name__}"
            )
        if str(region) in named:
            raise ValueError(f"regions must differ, got {region} twice")
        named[str(region)] = region
    return named


def describe_regions(regions: Mapping[str, Region]) -> dict[str, str]:
    """One line per region, equal for equal regions: what provenance says of them.

    Args:
        regions: Regions by name.

    Returns:
        By name, ``str(region)`` of a :class:`Patch` or :class:`Box` and ``"HxW weights, crc32
        XXXXXXXX"`` of weights, the checksum over their fp64 values.
    """
    return {
        name: _describe_weights(region) if isinstance(region, Tensor) else str(region)
        for name, region in regions.items()
    }


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
        rows = area_weights(height, size[0]).to(maps)
        columns = area_weights(width, size[1]).to(maps)
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
        region: A :class:`Patch`, a :class:`Box` or weights ``[height, width]`` >= 0 over the
            generated image.
        grid: Generated grid ``(height, width)`` of a layer.

    Returns:
        fp32 ``[height * width]`` on the region's device, area-resized, summing to 1.

    Raises:
        ValueError: If the weights are not ``[height, width]``, are negative or not finite, or are
            zero everywhere.
    """
    if isinstance(region, Patch):
        region = Box(region.row, region.column, 1, 1, region.grid)
    if isinstance(region, Box):
        rows = _overlap(region.top, region.height, region.size[0], grid[0])
        columns = _overlap(region.left, region.width, region.size[1], grid[1])
        return torch.outer(rows, columns).flatten().float()
    weights = region.double()
    if weights.ndim != 2:
        raise ValueError(f"region must be [height, width], got {list(weights.shape)}")
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise ValueError("region must hold finite weights >= 0, got negative or non-finite ones")
    if not bool((weights > 0).any()):
        raise ValueError("region must hold at least one weight > 0, got only zeros")
    weights = resize(weights / weights.max(), grid, mode="area").flatten()
    return (weights / weights.sum()).float()


def mask_weights(mask: Tensor, grid: Grid) -> Tensor:
    """A mask on a grid, each cell the share of it that the mask covers; not normalized.

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


def area_weights(source: int, target: int) -> Tensor:
    """Fp64 ``[target, source]``: each of `target` equal parts as the mean of what it covers."""
    # counted in 1 / (source * target), where every edge is a whole number and overlaps are exact
    start = torch.arange(target)[:, None] * source
    cell = torch.arange(source)[None, :] * target
    overlap = (start + source).minimum(cell + target) - start.maximum(cell)
    return overlap.clamp(min=0).double() / source


def _overlap(start: int, length: int, size: int, cells: int) -> Tensor:
    """Shares fp64 ``[cells]``, summing to 1, of an interval of `size` pixels in the equal cells."""
    # counted in 1 / cells of a pixel, where every edge is a whole number and overlaps are exact
    edges = torch.arange(cells + 1) * size
    low = edges[:-1].clamp(min=start * cells)
    high = edges[1:].clamp(max=(start + length) * cells)
    return (high - low).clamp(min=0).double() / (length * cells)


def _describe_weights(weights: Tensor) -> str:
    values = weights.detach().double().cpu().contiguous().numpy()
    return f"{'x'.join(map(str, weights.shape))} weights, crc32 {zlib.crc32(values.data):08x}"
