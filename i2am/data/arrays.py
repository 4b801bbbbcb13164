"""Pictures and masks as Python has them, PIL images, arrays or tensors, as tensors of one kind.

A PIL image means what its file would mean: see `i2am.data.images`. So does an array of colours
that is given for a mask. The numbers of an array without colours are taken as they are.
"""

import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from i2am.data.images import as_black_and_white, as_rgb, is_black_and_white
from i2am.data.objects import find_object

if TYPE_CHECKING:
    from PIL.Image import Image

    OneInput: TypeAlias = Image | np.ndarray | Tensor
    ImageInput: TypeAlias = OneInput | Sequence[OneInput]
else:
    # PIL is imported where there is a picture
    OneInput = ImageInput = Any

_COLOURS = (1, 3, 4)  # grey, RGB, RGBA
_PICTURE = "[height, width, 3]"
_MASK = "[height, width]"


def as_list(images: ImageInput, name: str) -> list[OneInput]:
    """The entries of a list of images, or the single argument as the only entry.

    Raises:
        TypeError: An entry is no image.
        ValueError: The list is empty.
    """
    items = list(images) if isinstance(images, list | tuple) else [images]
    if not items:
        raise ValueError(f"{name} must hold at least one image, got an empty list")
    for item in items:
        # nobody has a PIL image without having imported it
        pil = sys.modules.get("PIL.Image")
        if not isinstance(item, np.ndarray | Tensor) and not (pil and isinstance(item, pil.Image)):
            raise TypeError(
                f"{name} must be a PIL image, a NumPy array, a torch tensor or a list of them, "
                f"got {type(item).__name__}"
            )
    return items  # type: ignore[return-value]


def pictures(images: ImageInput, name: str) -> list[Tensor]:
    """Pictures as RGB: upright, with transparency laid over white.

    Args:
        images: A PIL image of any mode of at most 8 bits per channel, an array ``[height, width]``,
            ``[height, width, 1, 3 or 4]``, a tensor like that or ``[1, 3 or 4, height, width]``, a
            batch of arrays or tensors with channels, or a list of these. uint8 or floating.
        name: What the caller calls this argument, for error messages.

    Returns:
        One tensor ``[3, height, width]`` per picture, in the dtype and range it came in.

    Raises:
        TypeError: Something that is no image.
        ValueError: An empty list, a wrong shape, more than 8 bits per channel, or RGBA values
            outside [0, 1].
    """
    found: list[Tensor] = []
    for item in as_list(images, name):
        if not isinstance(item, np.ndarray | Tensor):
            found.append(_from_pil(as_rgb(item, name)))
            continue
        planes = _planes(item, name, _PICTURE)
        if planes.shape[1] == 4:
            planes = _over_white(planes, name)
        found.extend(planes.expand(-1, 3, -1, -1))
    return found


def masks(images: ImageInput, name: str) -> list[Tensor]:
    """Masks as numbers in [0, 1].

    A PIL image, or an array with colours, becomes 0 and 1 as `as_black_and_white` reads a file;
    one of 8 bits that looks like a picture is warned of. Of arrays without colours, bool and
    floating values are taken as they are, uint8 from 0 ... 255, or 0 and 1 where 1 is the largest.

    Args:
        images: As for `pictures`, or a batch ``[batch, height, width]``. Three axes are a batch
            unless the last one is 1, or 3 or 4 and shorter than both others.
        name: What the caller calls this argument, for error messages.

    Returns:
        One tensor ``[height, width]`` per mask, fp32, or fp64 if it came so.

    Raises:
        TypeError: Something that is no mask.
        ValueError: An empty list, a wrong shape, more than 8 bits, values outside [0, 1], or uint8
            values none of which is white.
    """
    found: list[Tensor] = []
    for item in as_list(images, name):
        if not isinstance(item, np.ndarray | Tensor):
            found.append(_cut(item, name))
            continue
        planes = _planes(item, name, _MASK)
        if planes.shape[1] == 1:
            found.extend(_weights(planes[:, 0], name))
        else:
            found.extend(_cut(_to_pil(one, name), name).to(planes.device) for one in planes)
    return found


def mask_batch(images: ImageInput, name: str) -> Tensor:
    """`masks` of one size as ``[masks, height, width]``.

    Raises:
        TypeError: As `masks`.
        ValueError: As `masks`, or sizes differ.
    """
    found = masks(images, name)
    if len({one.shape for one in found}) > 1:
        raise ValueError(f"{name} must be masks of one size, got {len(found)} that differ")
    return torch.stack(found)


def sizes(images: ImageInput, name: str) -> list[tuple[int, int]]:
    """(height, width) of every picture, upright.

    Raises:
        TypeError, ValueError: As `pictures`.
    """
    found: list[tuple[int, int]] = []
    for item in as_list(images, name):
        if not isinstance(item, np.ndarray | Tensor):
            # cheaper than its pixels
            sideways = item.getexif().get(0x0112, 1) >= 5
            found.append((item.width, item.height) if sideways else (item.height, item.width))
        else:
            planes = _planes(item, name, _PICTURE)
            found += [(planes.shape[2], planes.shape[3])] * len(planes)
    return found


def as_pil(images: ImageInput, name: str) -> "list[Image]":
    """`pictures` as PIL images of mode RGB; floating values are in [0, 1].

    Raises:
        TypeError, ValueError: As `pictures`, or values outside [0, 1].
    """
    return [_to_pil(one, name) for one in pictures(images, name)]


def object_mask(picture: OneInput, name: str = "picture") -> np.ndarray:
    """The object in a picture, from its alpha channel or else its plain background.

    A warning tells which of them it was and how much of the picture the object is. Look at the
    mask: it is a guess.

    Args:
        picture: One picture as for `pictures`; floating values are in [0, 1].
        name: What the caller calls it, for messages.

    Returns:
        bool ``[height, width]``, True on the object.

    Raises:
        TypeError, ValueError: As `pictures`; or the picture has neither, or hardly any object.
    """
    (item,) = as_list(picture, name)
    if isinstance(item, np.ndarray | Tensor):
        planes = _planes(item, name, _PICTURE)
        if len(planes) != 1:
            raise ValueError(f"{name} must be one picture, got {len(planes)}")
        item = _to_pil(planes[0], name)
    mask, source = find_object(item, name)
    warnings.warn(f"the mask of the object in {name} was made from {source}", stacklevel=2)
    return np.asarray(mask) > 0


def _planes(item: np.ndarray | Tensor, name: str, wanted: str) -> Tensor:
    """``[batch, 1, 3 or 4, height, width]`` of arrays and tensors, in their own dtype."""
    shape, is_mask = tuple(item.shape), wanted == _MASK
    first, last = isinstance(item, Tensor), not isinstance(item, Tensor)
    if len(shape) == 4:
        first = shape[1] in _COLOURS and (first or shape[3] not in _COLOURS)
        last = not first and shape[3] in _COLOURS
        batched = first or last
    elif len(shape) == 3 and is_mask:
        first = False
        last = (last and shape[2] == 1) or (shape[2] in (3, 4) and shape[2] < min(shape[:2]))
        batched = True
    elif len(shape) == 3:
        first = first and shape[0] in _COLOURS
        last = not first and shape[2] in _COLOURS
        batched = first or last
    else:
        first = last = False
        batched = len(shape) == 2
    if not batched or 0 in shape:
        raise ValueError(f"{name} must have shape {wanted} or a batch of that, got {list(shape)}")
    values = _as_tensor(item, name)
    if len(shape) == 2:
        return values[None, None]
    if len(shape) == 3:
        if not (first or last):
            return values[:, None]
        values = values[None]
    return values.movedim(-1, 1) if last else values


def _as_tensor(item: np.ndarray | Tensor, name: str) -> Tensor:
    values = item
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "biuf" or values.dtype.itemsize > 8:
            raise ValueError(f"{name} must hold real numbers, got {values.dtype}")
        # torch has no negative strides, which a flip or BGR to RGB leaves behind
        native = values.dtype.newbyteorder("=")
        values = torch.from_numpy(np.ascontiguousarray(values, dtype=native))
    if values.dtype in (torch.uint16, torch.uint32, torch.uint64):
        raise ValueError(
            f"{name} must be uint8, or floating in [0, 1], got {str(item.dtype).split('.')[-1]}"
        )
    if values.is_complex():
        raise ValueError(f"{name} must hold real numbers, got {values.dtype}")
    return values.detach()


def _weights(values: Tensor, name: str) -> Tensor:
    """``[batch, height, width]`` in [0, 1] of numbers without colours."""
    if values.dtype == torch.uint8:
        largest = int(values.max())
        if 1 < largest < 128:
            raise ValueError(
                f"{name} must be white, 255, or 1 in a mask of 0 and 1, where it covers, its "
                f"largest value is {largest}; of labels, choose one: labels == {largest}"
            )
        if largest == 1:
            return values.float()
        if any(not is_black_and_white(_to_pil(one[None], name)) for one in values):
            _warn_of_picture(name, "its grey levels count as parts of white")
        return values.float() / 255
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    # written so that NaN fails too
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(
            f"{name} must hold values in [0, 1] (uint8: [0, 255]), got "
            f"{values.min():.3g} to {values.max():.3g}"
        )
    return values


def _cut(image: "Image", name: str) -> Tensor:
    """``[height, width]`` of 0 and 1, as a file of that picture."""
    seen = as_rgb(image, name, background="black")
    mask = as_black_and_white(seen, name)
    if not mask.getbbox() and seen.getbbox():
        raise ValueError(
            f"{name} must be white where it covers, none of its pixels has half brightness"
        )
    if not is_black_and_white(seen):
        _warn_of_picture(name, "its pixels of half brightness and more count as white")
    return (_from_pil(mask)[0] > 0).float()


def _warn_of_picture(name: str, effect: str) -> None:
    warnings.warn(f"{name} looks like a picture rather than a mask: {effect}", stacklevel=4)


def _over_white(planes: Tensor, name: str) -> Tensor:
    if planes.dtype == torch.uint8:
        over = [_from_pil(as_rgb(_to_pil(one, name), name)) for one in planes]
        return torch.stack(over).to(planes.device)
    values = _unit(planes, name)
    return values[:, :3] * values[:, 3:] + 1 - values[:, 3:]


def _unit(planes: Tensor, name: str) -> Tensor:
    values = planes.float()
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(
            f"{name} must have values in [0, 1], got {values.min():.4g} to {values.max():.4g}"
        )
    return values


def _to_pil(planes: Tensor, name: str) -> "Image":
    """The PIL image of ``[1, 3 or 4, height, width]``."""
    if planes.dtype != torch.uint8:
        planes = (_unit(planes, name) * 255).round().to(torch.uint8)
    from PIL import Image

    pixels = planes.movedim(0, -1).cpu().contiguous().numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _from_pil(image: "Image") -> Tensor:
    """uint8 ``[1 or 3, height, width]``; its memory is its own."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.movedim(-1, 0)
