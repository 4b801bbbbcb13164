"""Pictures and masks as the pipelines take them: fp32 tensors at the size to generate.

Whatever `i2am.data.arrays` reads is accepted, floating values in [0, 1].
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from i2am.data.arrays import ImageInput, masks, pictures, sizes
from i2am.data.shapes import require_size


def read_images(images: ImageInput, name: str) -> list[Tensor]:
    """RGB images as tensors ``[3, height, width]``, fp32 in [-1, 1].

    Floating values are in [0, 1]. As in diffusers, negative ones anywhere mean that all floating
    entries are in [-1, 1] already: deprecated there, and a FutureWarning here.

    Args:
        images: As for `i2am.data.arrays.pictures`.
        name: What the caller calls this argument, for error messages.

    Raises:
        TypeError: Something that is no image.
        ValueError: As `pictures`, or values outside the range.
    """
    found = pictures(images, name)
    # of all entries together: an entry without dark pixels has the range of the others
    signed = any(bool((image < 0).any()) for image in found)
    if signed:
        warnings.warn(
            f"{name} holds negative values and is taken to be in [-1, 1]; give values in [0, 1]",
            FutureWarning,
            stacklevel=2,
        )
    return [_symmetric(image, signed, name) for image in found]


def read_masks(images: ImageInput, name: str) -> list[Tensor]:
    """Masks as tensors ``[1, height, width]``, fp32 in [0, 1]; 1 is the region to generate.

    Args:
        images: As for `i2am.data.arrays.masks`.
        name: What the caller calls this argument, for error messages.

    Raises:
        TypeError: Something that is no mask.
        ValueError: As `masks`.
    """
    return [mask[None].float() for mask in masks(images, name)]


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
    found = {*sizes(images, name)}
    if len(found) > 1:
        raise ValueError(f"all images of {name} must have the same size, got {sorted(found)}")
    return found.pop()


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
        require_size("mask_image", tuple(mask.shape[-2:]), "image", tuple(one.shape[-2:]))
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
