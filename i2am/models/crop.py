"""Cutting the object out of a reference image, whatever kind of image it is."""

import math

from PIL import Image
from torch import Tensor

from i2am.data.arrays import ImageInput, OneInput, as_list, pictures
from i2am.data.images import as_rgb
from i2am.data.shapes import require_size
from i2am.models.inputs import common_batch, read_masks


def crop_to_object(
    images: ImageInput, masks: ImageInput, enlargement: float, *, name: str, mask_name: str
) -> list[Image.Image | Tensor]:
    """The box around the object of each mask, somewhat enlarged, cut out of each image.

    Args:
        images: What `i2am.models.inputs.read_images` takes; results are PIL images for PIL images
            and tensors for all else.
        masks: What `read_masks` takes, above 0.5 on the object; one, or one per image.
        enlargement: By how much of its half extent the box grows to each side, at least 0. It
            ends where the image does.
        name: What the caller calls the images, for error messages.
        mask_name: The same for the masks.

    Raises:
        TypeError: Something that is no image or mask.
        ValueError: A mask is empty or has another size than its image, the counts differ, or
            the enlargement is negative or not finite.
    """
    if not 0 <= enlargement < math.inf:
        raise ValueError(
            f"crop_enlargement must be a finite number of at least 0, got {enlargement}"
        )
    singles = [single for item in as_list(images, name) for single in _upright(item, name)]
    read = read_masks(masks, mask_name)
    count = common_batch(**{name: len(singles), mask_name: len(read)})
    crops: list[Image.Image | Tensor] = []
    for index in range(count):
        image, mask = singles[index % len(singles)], read[index % len(read)][0] > 0.5
        size = image.size[::-1] if isinstance(image, Image.Image) else tuple(image.shape[-2:])
        require_size(mask_name, tuple(mask.shape), name, size)
        if not mask.any():
            raise ValueError(f"{mask_name} must be white somewhere, it is all black")
        top, bottom = _span(mask.any(dim=1), enlargement)
        left, right = _span(mask.any(dim=0), enlargement)
        if isinstance(image, Image.Image):
            crops.append(image.crop((left, top, right, bottom)))
        else:
            crops.append(image[..., top:bottom, left:right])
    return crops


def _upright(item: OneInput, name: str) -> list[Image.Image | Tensor]:
    # PIL images stay what they are: they are resized in 8 bits later
    return [as_rgb(item, name)] if isinstance(item, Image.Image) else [*pictures(item, name)]


def _span(occupied: Tensor, enlargement: float) -> tuple[int, int]:
    """First cell and the one behind the last of the enlarged interval."""
    found = occupied.nonzero()[:, 0]
    first, end = int(found[0]), int(found[-1]) + 1
    margin = (end - first) / 2 * enlargement
    return max(round(first - margin), 0), min(round(end + margin), len(occupied))
