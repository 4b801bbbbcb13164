"""Images and masks as text for a page: data addresses and outlines."""

import base64
from io import BytesIO
from typing import TYPE_CHECKING, Any

from i2am.data.images import as_black_and_white, as_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 640
"""Longer side of a picture in a page, in pixels."""


def shown(image: "Image", side: int = SIDE) -> "Image":
    """The image as RGB whose longer side is `side` pixels."""
    from PIL.Image import Resampling

    image = as_rgb(image)
    factor = side / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    way = Resampling.BICUBIC if factor > 1 else Resampling.LANCZOS
    return image.resize(size, way)


def jpeg(image: "Image", quality: int = 90) -> bytes:
    """The file of an RGB image, every channel at full resolution."""
    file = BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()


def address(data: bytes) -> str:
    """A JPEG file as a ``data:`` address."""
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def picture(image: "Image") -> dict[str, Any]:
    """An image as JSON values: address, width and height."""
    small = shown(image)
    return {"src": address(jpeg(small)), "width": small.width, "height": small.height}


def outline(mask: "Image", size: tuple[int, int]) -> str:
    """The border of a mask as an SVG path.

    Args:
        mask: White where it covers, any mode.
        size: ``(width, height)`` of the picture it is drawn over, in pixels.

    Returns:
        Straight pieces ``M x y h length`` and ``M x y v length`` in pixels of the picture.
    """
    import numpy as np
    from PIL import ImageFilter
    from PIL.Image import Resampling

    mask = as_black_and_white(mask)
    larger = mask.resize(size, Resampling.BICUBIC)
    # enlarged pixels would draw stairs
    blurred = larger.filter(ImageFilter.GaussianBlur(max(0.0, size[0] / mask.width - 1)))
    covered = np.asarray(blurred) >= 128
    pieces = []
    for letter, across in (("h", covered), ("v", covered.T)):
        # [lines, positions]: whether neighbours differ; the frame counts as outside
        edge = np.diff(np.pad(across, ((1, 1), (0, 0))).astype(np.int8), axis=0) != 0
        steps = np.diff(np.pad(edge, ((0, 0), (1, 1))).astype(np.int8), axis=1)
        starts, ends = np.argwhere(steps == 1), np.argwhere(steps == -1)
        for (line, start), (_, end) in zip(starts.tolist(), ends.tolist(), strict=True):
            place = f"{start} {line}" if letter == "h" else f"{line} {start}"
            pieces.append(f"M{place}{letter}{end - start}")
    return "".join(pieces)
