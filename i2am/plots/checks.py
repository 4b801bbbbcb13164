"""What every plotting function refuses: wrong shapes, values that are no numbers, wrong counts."""

from collections.abc import Iterable, Sequence, Sized
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from i2am.data.images import as_rgb
from i2am.plots.style import Picture

Images = Any
"""One picture, or a stack or sequence of them."""
Maps = Any
"""Raw maps of one picture, or a stack or sequence of those."""


def rgb(image: Any, name: str) -> Picture:
    """A picture as an array.

    Args:
        image: uint8 ``[height, width, 3]``, array or tensor; or a PIL image of any mode, which is
            turned upright and laid over white.
        name: The argument's name, for the message.

    Returns:
        The same pixels; memory may be shared.

    Raises:
        ValueError: It is something else, or empty.
    """
    # only PIL images know of EXIF data
    array = np.asarray(as_rgb(image, name)) if hasattr(image, "getexif") else _array(image, name)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or array.size == 0:
        raise ValueError(
            f"{name} must be a uint8 picture [height, width, 3], got {array.dtype} {array.shape}"
        )
    return array


def unit_map(values: Any, name: str) -> NDArray[np.floating]:
    """A finished map as an array.

    Args:
        values: ``[height, width]`` in [0, 1].
        name: The argument's name, for the message.

    Returns:
        fp32 for fp32 input and fp64 otherwise.

    Raises:
        ValueError: It has another shape, is empty, or holds values that are not finite or outside
            [0, 1].
    """
    array = _array(values, name)
    if array.dtype != np.float32:
        array = array.astype(np.float64)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{name} must be a map [height, width], got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(
            f"{name} must be finite, got {int((~np.isfinite(array)).sum())} NaN or infinite"
        )
    if array.min() < 0 or array.max() > 1:
        raise ValueError(f"{name} must be in [0, 1], got {array.min():.4g} to {array.max():.4g}")
    return array


def raw_maps(values: Any, name: str, *axes: str) -> Tensor:
    """Raw maps as a tensor.

    Args:
        values: ``[*axes, height, width]``, any real dtype: array or tensor.
        name: The argument's name, for the message.
        axes: Names of the leading axes.

    Returns:
        fp32 or fp64 on the CPU.

    Raises:
        ValueError: It has another number of axes, an axis of length 0, or NaN or infinite values.
    """
    array = _array(values, name)
    wanted = (*axes, "height", "width")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold real numbers, got {array.dtype}")
    if array.ndim != len(wanted) or array.size == 0:
        raise ValueError(f"{name} must be [{', '.join(wanted)}], got shape {array.shape}")
    broken = ~np.isfinite(array).all(axis=(-2, -1))
    if broken.any():
        raise ValueError(
            f"{name} must be finite, got NaN or infinite values in {int(broken.sum())} of "
            f"{broken.size} maps"
        )
    wide = array.dtype if array.dtype == np.float64 else np.float32
    return torch.from_numpy(np.array(array, dtype=wide))


def pictures(images: Any, name: str) -> list[Picture]:
    """One picture, or a sequence of them, as a list.

    Raises:
        ValueError: One of them is no picture as for `rgb`, or there is none.
    """
    if _several(images):
        several = [rgb(image, f"{name}[{index}]") for index, image in enumerate(images)]
        if not several:
            raise ValueError(f"{name} must hold at least one picture, got none")
        return several
    return [rgb(images, name)]


def same_number(name: str, values: Sized, than: str, wanted: int) -> None:
    """Refuses a sequence that has not one entry per something else.

    Raises:
        ValueError: It has not.
    """
    if len(values) != wanted:
        raise ValueError(f"{name} must be as many as {than}, got {len(values)} for {wanted}")


def one_each(maps: Any, images: Any, *, name: str, image: str, axes: Iterable[str]) -> list[Tensor]:
    """Raw maps of every picture: a stack or sequence of several, or those of a single one.

    Args:
        maps: ``[*axes, height, width]`` where `images` is a single picture, else one such per
            picture.
        images: As for `pictures`.
        name: Name of the argument `maps`.
        image: Name of the argument `images`.
        axes: Names of the leading axes.

    Raises:
        ValueError: As for `raw_maps` and `pictures`, or the numbers differ.
    """
    if not _several(images):
        return [raw_maps(maps, name, *axes)]
    if not isinstance(maps, Sequence) and getattr(maps, "ndim", 0) == 0:
        raise ValueError(f"{name} must hold maps per picture, got {type(maps).__name__}")
    same_number(name, maps, f"pictures in {image}", len(pictures(images, image)))
    return [raw_maps(one, f"{name}[{index}]", *axes) for index, one in enumerate(maps)]


def _several(images: Any) -> bool:
    return isinstance(images, Sequence) or getattr(images, "ndim", 3) == 4


def _array(value: Any, name: str) -> NDArray[Any]:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        # numpy has no bfloat16
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    try:
        return np.asarray(value)
    except ValueError:
        raise ValueError(f"{name} must be one array, got parts of different shapes") from None
