"""Colours, overlays and contact sheets with numpy and Pillow: milliseconds each, no matplotlib.

Arrays go in and come out; nothing is read or written. Maps are ``[height, width]`` in [0, 1],
pictures uint8 ``[height, width, 3]``.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from i2am.plots.checks import rgb, unit_map
from i2am.plots.style import ALPHA, Picture, blend, check_style, colors

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont, ImageFont

SIDE = 288
"""Longer side of a picture in a sheet, and at least that in a figure."""

_MARGIN, _GAP, _TEXT, _BAR = 12, 10, 13, 14
_BAND = 64
_INK, _PAPER = (24, 24, 24), (255, 255, 255)


def heat(values: ArrayLike, *, style: str = "default") -> Picture:
    """Colour a map: by default black is 0, pale yellow is 1.

    Args:
        values: Map ``[height, width]`` in [0, 1].
        style: "default" (inferno) or "paper" (jet).

    Returns:
        uint8 ``[height, width, 3]``.

    Raises:
        ValueError: The map is not two-dimensional, is empty, or has values that are not finite or
            outside [0, 1]; or the style is unknown.
    """
    return colors(unit_map(values, "values"), style)


def overlay(
    image: ArrayLike, values: ArrayLike, *, alpha: float | None = None, style: str = "default"
) -> Picture:
    """Lay a map over an image.

    By default the image is grey where the map is 0, and colour grows with the value: it is that of
    `heat`, and its opacity rises from 0 to `alpha` over the lower half of the range.
    ``style="paper"`` adds jet colours everywhere, as the published code does: image x 0.7 + colours
    x 0.5, cut off at 255.

    Args:
        image: uint8 ``[height, width, 3]``.
        values: Map of the same height and width in [0, 1].
        alpha: Opacity of the default style's colours at values of 0.5 and more, in [0, 1]; None is
            0.85.
        style: "default" or "paper".

    Returns:
        uint8 ``[height, width, 3]``.

    Raises:
        ValueError: `image` is no uint8 RGB picture, the sizes differ, `values` is no map as in
            `heat`, `alpha` is outside [0, 1] or given to the paper's style, or the style is
            unknown.
    """
    picture, unit = rgb(image, "image"), unit_map(values, "values")
    if unit.shape != picture.shape[:2]:
        raise ValueError(
            f"values must have the image's height and width {picture.shape[:2]}, got {unit.shape}"
        )
    if check_style(style) == "paper" and alpha is not None:
        raise ValueError(
            f"alpha must be left out for style 'paper', whose weights are fixed, got {alpha}"
        )
    alpha = ALPHA if alpha is None else alpha
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    result = np.empty_like(picture)
    # row by row in bands: photographs are large, and floats eight times larger
    for top in range(0, len(unit), _BAND):
        band = slice(top, top + _BAND)
        result[band] = np.rint(blend(picture[band], unit[band], style=style, alpha=alpha))
    return result


def resized(image: ArrayLike, side: int) -> Picture:
    """A picture at another size, its shape kept.

    Args:
        image: uint8 ``[height, width, 3]``.
        side: Pixels of the longer side.

    Returns:
        uint8 ``[height, width, 3]``: bicubic where it grows, Lanczos where it shrinks.

    Raises:
        ValueError: `image` is no uint8 RGB picture, or `side` is below 1.
    """
    from PIL import Image

    picture = rgb(image, "image")
    if side < 1:
        raise ValueError(f"side must be at least 1, got {side}")
    height, width = picture.shape[:2]
    factor = side / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    way = Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(picture).resize(size, way))


def enlarged(image: ArrayLike) -> Picture:
    """A picture with `SIDE` pixels along its longer side at least, for maps with smooth edges."""
    picture = rgb(image, "image")
    return picture if max(picture.shape) >= SIDE else resized(picture, SIDE)


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
    pictures = [rgb(tile, f"tiles[{index}]") for index, tile in enumerate(tiles)]
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
