"""From attribution maps to pictures (eqs 8-9): min-max, resize to pixels, threshold."""

import torch
from torch import Tensor

from i2am.attribution.grid import Grid, resize
from i2am.attribution.presets import Preset, get_preset


def is_constant(maps: Tensor, *, shared: bool | tuple[int, ...] = False) -> Tensor:
    """Whether a map says nothing: its values differ by no more than the rounding of fp32 sums.

    Args:
        maps: ``[..., height, width]``.
        shared: As in :func:`normalize`.

    Returns:
        bool ``[..., 1, 1]``, leading axes that share their range being 1 as well.
    """
    axes = _axes(maps, shared)
    spread = maps.amax(axes, keepdim=True) - maps.amin(axes, keepdim=True)
    return spread <= 1e-6 * maps.abs().amax(axes, keepdim=True)


def normalize(
    maps: Tensor, *, shared: bool | tuple[int, ...] = False, epsilon: float = 0.0
) -> Tensor:
    """Min-max to [0, 1], each map by itself or groups of maps by a common minimum and maximum.

    Args:
        maps: ``[..., height, width]``, any real dtype.
        shared: Leading axes whose maps share one minimum and maximum, so that they can be compared
            (the time axis, say). ``True`` names them all, ``False`` none.
        epsilon: Added to the range that is divided by.

    Returns:
        ``[..., height, width]`` in [0, 1], fp64 for fp64 input and fp32 otherwise. A constant map
        is 0 everywhere.

    Raises:
        ValueError: If `maps` has fewer than two axes or an empty grid, holds NaN or Inf, or
            `shared` names an axis that is not a leading one.
    """
    if maps.ndim < 2 or 0 in maps.shape[-2:]:
        raise ValueError(f"maps must be [..., height, width], not empty, got {list(maps.shape)}")
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    broken = int((~maps.isfinite()).flatten(-2).any(-1).sum())
    if broken:
        total = maps[..., 0, 0].numel()
        raise ValueError(f"maps must be finite, got NaN or Inf in {broken} of {total} maps")
    axes = _axes(maps, shared)
    if maps.numel() == 0:
        return maps
    low = maps.amin(axes, keepdim=True)
    spread = maps.amax(axes, keepdim=True) - low + epsilon
    constant = is_constant(maps, shared=shared)
    return ((maps - low) / spread.where(~constant, 1)).where(~constant, 0)


def threshold(maps: Tensor, value: float = 0.4) -> Tensor:
    """Sets what is not above `value` to 0 (eq 9).

    Args:
        maps: Any shape, normalized to [0, 1].
        value: Largest value that is dropped.

    Returns:
        The shape and dtype of `maps`.
    """
    return maps.where(maps > value, 0)


def mask_product(maps: Tensor, mask: Tensor) -> Tensor:
    """Maps times a mask that is resized to their grid (bicubic, so edges over- and undershoot).

    The published code does this to G2R maps before it normalizes them.

    Args:
        maps: ``[..., height, width]``.
        mask: ``[..., H, W]`` in [0, 1], leading axes broadcastable to those of `maps`.

    Returns:
        The shape of `maps`.
    """
    height, width = maps.shape[-2:]
    return maps * resize(mask.to(maps.dtype), (height, width), mode="bicubic")


def picture(
    maps: Tensor,
    size: Grid,
    *,
    preset: str | Preset = "paper",
    threshold: float | None = 0.4,
    shared: bool | tuple[int, ...] = False,
    invert: bool = False,
    epsilon: float = 0.0,
) -> Tensor:
    """What eqs 8-9 draw: min-max, bicubic to pixels, drop what is not above the threshold.

    Args:
        maps: Raw maps ``[..., height, width]``.
        size: Pixels ``(height, width)``.
        preset: ``"paper"`` normalizes once and clamps the resized map to [0, 1]; ``"official"``
            normalizes a second time instead.
        threshold: Largest value that is dropped; None keeps everything.
        shared: As in :func:`normalize`.
        invert: Draw ``1 - map``, as the published code does for R2G of single-token layers.
        epsilon: As in :func:`normalize`.

    Returns:
        ``[..., *size]`` in [0, 1], fp64 for fp64 input and fp32 otherwise.

    Raises:
        ValueError: As :func:`normalize` and :func:`~i2am.attribution.resize` do, or if the preset
            is unknown.
    """
    preset = get_preset(preset)
    maps = resize(normalize(maps, shared=shared, epsilon=epsilon), size, mode="bicubic")
    if preset.normalizations == 2:
        maps = normalize(maps, shared=shared, epsilon=epsilon)
    else:
        maps = maps.clamp(0, 1)
    if invert:
        maps = 1 - maps
    return maps if threshold is None else maps.where(maps > threshold, 0)


def _axes(maps: Tensor, shared: bool | tuple[int, ...]) -> tuple[int, ...]:
    leading = maps.ndim - 2
    if isinstance(shared, bool):
        return tuple(range(maps.ndim)) if shared else (-2, -1)
    if not all(-maps.ndim <= axis < leading and axis not in (-2, -1) for axis in shared):
        raise ValueError(f"shared must name leading axes of {list(maps.shape)}, got {shared}")
    return (*{axis % maps.ndim for axis in shared}, -2, -1)
