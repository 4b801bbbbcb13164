"""Images and masks from PIL, NumPy or torch, on one footing: lists of fp32 tensors.

One rule for every pipeline, that of diffusers' image processor: PIL images of any mode; NumPy
arrays with channels last and torch tensors with channels first, in [0, 1]. Images of uint8 are in
0 ... 255, and so are uint8 arrays of masks.
"""

import warnings
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

OneInput = Image.Image | np.ndarray | Tensor
ImageInput = OneInput | Sequence[OneInput]
Array = TypeVar("Array", np.ndarray, Tensor)


def read_images(images: ImageInput, name: str) -> list[Tensor]:
    """RGB images as tensors ``[3, height, width]``, fp32 in [-1, 1].

    Floating values are in [0, 1]. As in diffusers, negative ones anywhere mean that all floating
    entries are in [-1, 1] already: deprecated there, and a FutureWarning here.

    Args:
        images: One image, a batched array ``[batch, height, width, 3]`` or tensor
            ``[batch, 3, height, width]``, or a list of single images.
        name: What the caller calls this argument, for error messages.

    Raises:
        TypeError: Something that is no image.
        ValueError: An empty list, a wrong shape, or values outside the range.
    """
    batches: list[Tensor] = []
    for item in as_list(images, name):
        if isinstance(item, Image.Image):
            item = np.array(item.convert("RGB"))
        if isinstance(item, np.ndarray):
            batch = _from_numpy(_batched(item, 4, name, "[height, width, 3]")).movedim(-1, 1)
        else:
            batch = _batched(item, 4, name, "[3, height, width]")
        if batch.shape[1] != 3:
            raise ValueError(f"{name} must have 3 channels, got shape {list(item.shape)}")
        batches.append(batch)
    # of all entries together: an entry without dark pixels has the range of the others
    signed = any(bool((batch < 0).any()) for batch in batches)
    if signed:
        warnings.warn(
            f"{name} holds negative values and is taken to be in [-1, 1]; give values in [0, 1]",
            FutureWarning,
            stacklevel=2,
        )
    return [image for batch in batches for image in _symmetric(batch, signed, name)]


def read_masks(masks: ImageInput, name: str) -> list[Tensor]:
    """Masks as tensors ``[1, height, width]``, fp32 in [0, 1]; 1 is the region to generate.

    Args:
        masks: As for `read_images`, with one channel or none; bool arrays are accepted.
        name: What the caller calls this argument, for error messages.

    Raises:
        TypeError: Something that is no mask.
        ValueError: An empty list, a wrong shape, or values outside the range.
    """
    found: list[Tensor] = []
    for item in as_list(masks, name):
        if isinstance(item, Image.Image):
            item = np.array(item.convert("L"))
        if isinstance(item, np.ndarray):
            if item.ndim >= 3 and item.shape[-1] == 1:
                item = item[..., 0]
            batch = _from_numpy(_batched(item, 3, name, "[height, width]"))
            batch = batch / 255 if batch.dtype == torch.uint8 else batch
        else:
            if item.ndim == 4 and item.shape[1] == 1:
                item = item[:, 0]
            batch = _batched(item, 3, name, "[height, width]")
        found.extend(_in_range(batch, 0, name)[:, None])
    return found


def fit(images: list[Tensor], size: tuple[int, int]) -> Tensor:
    """One batch ``[batch, channels, *size]``; what has another size is resized, see
    `resize_antialiased`."""
    return torch.cat([resize_antialiased(image[None], size) for image in images])


def resize_antialiased(images: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """``[batch, channels, h, w]`` to (height, width), antialiased; untouched if it is that size."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size=size, mode=mode, align_corners=False, antialias=True)


def same_size(images: ImageInput, name: str) -> tuple[int, int]:
    """The (height, width) that all images share; only shapes are looked at.

    Raises:
        TypeError: Something that is no image.
        ValueError: An empty list, a wrong shape, or sizes that differ.
    """
    found: set[tuple[int, ...]] = set()
    for item in as_list(images, name):
        if isinstance(item, Image.Image):
            found.add((item.height, item.width))
        elif isinstance(item, np.ndarray):
            found.add(_batched(item, 4, name, "[height, width, 3]").shape[1:3])
        else:
            found.add(tuple(_batched(item, 4, name, "[3, height, width]").shape[2:]))
    if len(found) > 1:
        raise ValueError(f"all images of {name} must have the same size, got {sorted(found)}")
    height, width = found.pop()
    return height, width


def read_person(
    image: ImageInput | None, mask_image: ImageInput | None, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The image to paint on and its keep mask at the size to generate, as batches of one length.

    Args:
        image: What `read_images` takes.
        mask_image: What `read_masks` takes, above 0.5 where the image is to be generated.
        size: (height, width) to generate.

    Returns:
        The image ``[batch, 3, height, width]`` in [-1, 1] and the keep mask
        ``[batch, 1, height, width]``, 1 where pixels stay and 0 where they are generated.

    Raises:
        ValueError: One is None, a mask has another size than its image, or the batch sizes differ.
    """
    if image is None or mask_image is None:
        missing, other = ("image", "mask_image") if image is None else ("mask_image", "image")
        raise ValueError(f"{missing} must be given together with {other}, got None")
    images, masks = read_images(image, "image"), read_masks(mask_image, "mask_image")
    batch = common_batch(image=len(images), mask_image=len(masks))
    for index in range(batch):
        one, mask = images[index % len(images)], masks[index % len(masks)]
        if one.shape[-2:] != mask.shape[-2:]:
            raise ValueError(
                f"mask_image must have the size of image, {_size(one)} (height x width), "
                f"got {_size(mask)}"
            )
    keep = (fit(masks, size) <= 0.5).float()
    return per_sample(fit(images, size), batch, 1), per_sample(keep, batch, 1)


def common_batch(**counts: int) -> int:
    """The batch size of several inputs, each of which has one entry or as many as the batch.

    Args:
        counts: Number of images by argument name.

    Raises:
        ValueError: Two inputs have different numbers, both more than one.
    """
    batch = max(counts.values())
    for name, count in counts.items():
        if count not in (1, batch):
            largest = next(other for other in counts if counts[other] == batch)
            raise ValueError(
                f"{name} must hold 1 image or {batch}, as many as {largest}, got {count}"
            )
    return batch


def per_sample(batch: Tensor, count: int, repeats: int) -> Tensor:
    """``[1 or count, ...]`` to ``[count * repeats, ...]``, the repeats of an entry side by side."""
    return batch.expand(count, *batch.shape[1:]).repeat_interleave(repeats, dim=0)


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
        if not isinstance(item, Image.Image | np.ndarray | Tensor):
            raise TypeError(
                f"{name} must be a PIL image, a NumPy array, a torch tensor or a list of them, "
                f"got {type(item).__name__}"
            )
    return items  # type: ignore[return-value]


def _batched(item: Array, ndim: int, name: str, shape: str) -> Array:
    if item.ndim not in (ndim - 1, ndim) or 0 in item.shape:
        raise ValueError(
            f"{name} must have shape {shape} or a batch of that, got {list(item.shape)}"
        )
    return item if item.ndim == ndim else item[None]


def _from_numpy(array: np.ndarray) -> Tensor:
    # torch has no negative strides, which a flip or BGR to RGB leaves behind
    return torch.from_numpy(np.ascontiguousarray(array))


def _symmetric(images: Tensor, signed: bool, name: str) -> Tensor:
    """To fp32 in [-1, 1], from there if `signed`, else from [0, 1]; uint8 from 0 ... 255."""
    if images.dtype == torch.uint8:
        return images.float() / 255 * 2 - 1
    return _in_range(images, -1, name) if signed else _in_range(images, 0, name) * 2 - 1


def _in_range(values: Tensor, low: int, name: str) -> Tensor:
    values = values.float()
    # not (a <= x <= b) also catches NaN
    if not bool(((values >= low) & (values <= 1)).all()):
        raise ValueError(
            f"{name} must have values in [{low}, 1], got {values.min():.4g} to {values.max():.4g}"
        )
    return values


def _size(image: Tensor) -> str:
    return f"{image.shape[-2]} x {image.shape[-1]}"
