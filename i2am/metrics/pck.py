"""PCK, the percentage of correct keypoints: does a map point to the true place on the reference?

Positions are ``(y, x)`` in cells of the map's grid, measured from its upper left corner: the centre
of the first cell is (0.5, 0.5), and a place given as fractions of height and width is that fraction
times the grid.
"""

import math
from typing import Literal

import torch
from torch import Tensor


def peak(maps: Tensor) -> Tensor:
    """Centre of the cell with the largest value; of several, the first in reading order.

    Args:
        maps: ``[..., height, width]``, any real dtype.

    Returns:
        Positions ``[..., 2]`` in cells, fp32 (fp64 for fp64 maps).

    Raises:
        ValueError: If `maps` has fewer than two axes or an empty grid, or holds NaN or Inf.
    """
    values = _checked(maps)
    width = values.shape[-1]
    cell = values.flatten(-2).argmax(-1)
    return torch.stack([cell // width, cell % width], -1).to(values) + 0.5


def centroid(maps: Tensor) -> Tensor:
    """Mean position of a map's mass.

    Args:
        maps: ``[..., height, width]`` of values >= 0, any real dtype.

    Returns:
        Positions ``[..., 2]`` in cells, fp32 (fp64 for fp64 maps).

    Raises:
        ValueError: If `maps` has fewer than two axes or an empty grid, holds NaN, Inf or a negative
            value, or a map is zero everywhere.
    """
    values = _checked(maps)
    if bool((values < 0).any()):
        raise ValueError(f"maps must hold values >= 0, got {values.min():.4g}")
    mass = values.sum((-2, -1))
    if bool((mass == 0).any()):
        raise ValueError("maps must have a mass, got one that is zero everywhere")
    rows, columns = (
        torch.arange(cells, dtype=values.dtype, device=values.device) + 0.5
        for cells in values.shape[-2:]
    )
    y = (values.sum(-1) * rows).sum(-1) / mass
    x = (values.sum(-2) * columns).sum(-1) / mass
    return torch.stack([y, x], -1)


def pck(
    predicted: Tensor,
    true: Tensor,
    *,
    threshold: float,
    diagonal: float,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Percentage of correct keypoints, as a share: how many predictions lie near the true place.

    Near is no farther than ``threshold * diagonal``. Choose .05 or .10, and give the score of a
    guess beside it: a garment is in the middle of its picture and worn in the middle of another, so
    that at .20 "the same position as in the generated image" was right for 97 % of the patches
    (55 % at .10, 18 % at .05) of drawn try-on scenes, without a look at the garment. There is no
    default for that reason.

    Args:
        predicted: Positions ``[..., 2]``.
        true: The true ones, of the same shape and in the same unit.
        threshold: Largest distance that counts as right, as a share of the diagonal, in (0, 1].
        diagonal: Length of the reference's diagonal in the unit of the positions; for cells of a
            16 x 12 grid ``math.hypot(16, 12)``.
        reduction: ``"mean"`` gives the share, ``"none"`` which predictions are right.

    Returns:
        fp64 scalar in [0, 1], or bool ``[...]``.

    Raises:
        ValueError: If the shapes are not both ``[..., 2]`` or there is no position, a position is
            NaN or Inf, `threshold` leaves (0, 1], `diagonal` is no positive finite number, or
            `reduction` is unknown.

    Example:
        >>> there = torch.tensor([[2.5, 4.5], [7.5, 1.5]])
        >>> pck(there + torch.tensor([1.0, 0.0]), there, threshold=0.05, diagonal=20)
        tensor(1., dtype=torch.float64)
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1], got {threshold}")
    if not 0 < diagonal < math.inf:
        raise ValueError(f"diagonal must be a positive finite number, got {diagonal}")
    for name, positions in (("predicted", predicted), ("true", true)):
        if positions.ndim < 1 or positions.shape[-1] != 2 or positions.numel() == 0:
            raise ValueError(
                f"{name} must be positions [..., 2], not empty, got {list(positions.shape)}"
            )
        if not bool(positions.isfinite().all()):
            raise ValueError(f"{name} must be finite, got NaN or Inf")
    if predicted.shape != true.shape:
        raise ValueError(
            "predicted and true must have the same shape, "
            f"got {list(predicted.shape)} and {list(true.shape)}"
        )
    distance = (predicted.double() - true.double()).square().sum(-1).sqrt()
    right = distance <= threshold * diagonal
    return right if reduction == "none" else right.double().mean()


def _checked(maps: Tensor) -> Tensor:
    if maps.ndim < 2 or 0 in maps.shape:
        raise ValueError(f"maps must be [..., height, width], not empty, got {list(maps.shape)}")
    if not bool(maps.isfinite().all()):
        raise ValueError("maps must be finite, got NaN or Inf")
    return maps.to(torch.promote_types(maps.dtype, torch.float32))
