"""Colours, overlays and contact sheets with numpy and Pillow: milliseconds each, no matplotlib.

Arrays go in and come out; nothing is read or written. Maps are ``[height, width]`` in [0, 1],
pictures uint8 ``[height, width, 3]``.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont, ImageFont

Picture = NDArray[np.uint8]

# inferno (van der Walt and Smith, CC0) at ten equal steps: perceptual, brightness rises throughout
_INFERNO = "000004 1b0c42 4b0c6b 781c6d a52c60 cf4446 ed6925 fb9a06 f7d03c fcffa4"  # values 0 to 1

_MARGIN, _GAP, _TEXT, _BAR = 12, 10, 13, 14
_BAND = 64
_INK, _PAPER = (24, 24, 24), (255, 255, 255)


def heat(values: ArrayLike) -> Picture:
    """Colour a map: black is 0, pale yellow is 1.

    Args:
        values: Map ``[height, width]`` in [0, 1].

    Returns:
        uint8 ``[height, width, 3]``.

    Raises:
        ValueError: The map is not two-dimensional, is empty, or has values that are not finite or
            outside [0, 1].
    """
    return _colors()[_index(_unit_map(values))]


def overlay(image: ArrayLike, values: ArrayLike, *, alpha: float = 0.85) -> Picture:
    """Lay a map over an image: the image in grey where the map is 0, colour growing with the value.

    The colour of a value is that of `heat`; its opacity rises from 0 to `alpha` over the lower half
    of the range.

    Args:
        image: uint8 ``[height, width, 3]``.
        values: Map of the same height and width in [0, 1].
        alpha: Opacity of the colours at values of 0.5 and more, in [0, 1].

    Returns:
        uint8 ``[height, width, 3]``.

    Raises:
        ValueError: `image` is no uint8 RGB picture, the sizes differ, `values` is no map as in
            `heat`, or `alpha` is outside [0, 1].
    """
    picture = _rgb(image, "image")
    unit = _unit_map(values)
    if unit.shape != picture.shape[:2]:
        raise ValueError(
            f"values must have the image's height and width {picture.shape[:2]}, got {unit.shape}"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    result = np.empty_like(picture)
    # row by row in bands: photographs are large, and floats eight times larger
    for top in range(0, len(unit), _BAND):
        band = slice(top, top + _BAND)
        grey = picture[band] @ np.array([0.299, 0.587, 0.114])
        backdrop = 0.25 * picture[band] + 0.75 * grey[..., None]
        weight = (alpha * np.minimum(2 * unit[band], 1))[..., None]
        colors = _colors()[_index(unit[band])]
        result[band] = np.rint((1 - weight) * backdrop + weight * colors)
    return result


def contact_sheet(
    tiles: Sequence[ArrayLike],
    titles: Sequence[str],
    *,
    columns: int,
    heading: str | None = None,
    color_bar: bool = True,
) -> Picture:
    """Arrange pictures in rows under their titles.

    Titles are broken between words to the width of their column; a single wider word is cut.

    Args:
        tiles: uint8 pictures ``[height, width, 3]`` of any sizes, centred in their cells, not
            scaled.
        titles: One line of text per tile.
        columns: Tiles per row.
        heading: Text above everything, or None.
        color_bar: Whether to add the scale of `heat` from 0 to 1 below.

    Returns:
        uint8 ``[height, width, 3]`` on white.

    Raises:
        ValueError: There are no tiles, titles and tiles differ in number, `columns` is below 1, or
            a tile is no uint8 RGB picture.
    """
    from PIL import Image, ImageDraw

    if not tiles:
        raise ValueError("tiles must hold at least one picture, got none")
    if len(titles) != len(tiles):
        raise ValueError(f"titles must be as many as tiles, got {len(titles)} for {len(tiles)}")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    pictures = [_rgb(tile, f"tiles[{index}]") for index, tile in enumerate(tiles)]
    columns = min(columns, len(pictures))

    cell_width = max(max(picture.shape[1] for picture in pictures), 6 * _TEXT)
    sheet_width = 2 * _MARGIN + columns * cell_width + (columns - 1) * _GAP
    font, line = _font(_TEXT), math.ceil(_TEXT * 1.3)
    labels = [_wrap(title, font, cell_width) for title in titles]
    headline = _wrap(heading, font, sheet_width - 2 * _MARGIN) if heading else []

    rows = [
        range(start, min(start + columns, len(pictures)))
        for start in range(0, len(pictures), columns)
    ]
    text_heights = [line * max(len(labels[index]) for index in row) + 3 for row in rows]
    tile_heights = [max(pictures[index].shape[0] for index in row) for row in rows]
    height = 2 * _MARGIN + sum(text_heights) + sum(tile_heights) + _GAP * (len(rows) - 1)
    height += line * len(headline) + (_GAP if headline else 0)
    height += _GAP + _BAR + line if color_bar else 0

    sheet = Image.new("RGB", (sheet_width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for text in headline:
        draw.text((_MARGIN, top), text, fill=_INK, font=font)
        top += line
    top += _GAP if headline else 0
    for row, text_height, tile_height in zip(rows, text_heights, tile_heights, strict=True):
        for column, index in enumerate(row):
            left = _MARGIN + column * (cell_width + _GAP)
            for number, text in enumerate(labels[index]):
                draw.text((left, top + number * line), text, fill=_INK, font=font)
            inset = (cell_width - pictures[index].shape[1]) // 2
            sheet.paste(Image.fromarray(pictures[index]), (left + inset, top + text_height))
        top += text_height + tile_height + _GAP
    if color_bar:
        width = min(256, sheet_width - 2 * _MARGIN)
        ramp = heat(np.broadcast_to(np.linspace(0, 1, width), (_BAR, width)))
        sheet.paste(Image.fromarray(ramp), (_MARGIN, top))
        draw.text((_MARGIN, top + _BAR + 1), "0", fill=_INK, font=font)
        draw.text((_MARGIN + width, top + _BAR + 1), "1", fill=_INK, font=font, anchor="ra")
    return np.asarray(sheet)


@cache
def _colors() -> Picture:
    stops = np.array([list(bytes.fromhex(stop)) for stop in _INFERNO.split()], dtype=np.float64)
    places, steps = np.linspace(0, 1, len(stops)), np.linspace(0, 1, 256)
    table = np.stack([np.interp(steps, places, stops[:, channel]) for channel in range(3)], axis=1)
    return np.rint(table).astype(np.uint8)


def _index(unit: NDArray[np.floating]) -> NDArray[np.intp]:
    return np.rint(unit * 255).astype(np.intp)


def _unit_map(values: ArrayLike) -> NDArray[np.floating]:
    array = np.asarray(values)
    if array.dtype != np.float32:
        array = array.astype(np.float64)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"values must be a map [height, width], got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(
            f"values must be finite, got {int((~np.isfinite(array)).sum())} NaN or infinite"
        )
    if array.min() < 0 or array.max() > 1:
        raise ValueError(f"values must be in [0, 1], got {array.min():.4g} to {array.max():.4g}")
    return array


def _rgb(image: Any, name: str) -> Picture:
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or array.size == 0:
        raise ValueError(
            f"{name} must be a uint8 picture [height, width, 3], got {array.dtype} {array.shape}"
        )
    return array


@cache
def _font(size: int) -> "FreeTypeFont | ImageFont":
    from PIL import ImageFont

    return ImageFont.load_default(size=size)


def _wrap(text: str, font: "FreeTypeFont | ImageFont", width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        while font.getlength(word) > width and len(word) > 1:
            word = word[:-2] + "\N{HORIZONTAL ELLIPSIS}"
        lines.append(word)
    return lines or [""]
