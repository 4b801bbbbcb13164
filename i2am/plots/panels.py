"""Panels in rows: what every figure is made of.

Figures are made without pyplot and without touching rcParams, so nothing is shown, kept alive or
changed for other figures.
"""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from i2am.attribution.postprocess import is_constant, picture
from i2am.attribution.presets import Preset, get_preset
from i2am.plots.overlay import enlarged, overlay
from i2am.plots.style import Picture, check_style, color_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
# inches
_WIDTH, _PANEL, _BAR = 9.0, 1.9, 0.6
_TITLE, _LINE = 8, 0.155
# width of a letter, in units of the font's size
_LETTER = 0.52


@dataclass(frozen=True)
class Panel:
    """One picture of a figure, or a sentence in its place."""

    title: str
    pixels: Picture | None
    """uint8 ``[height, width, 3]``."""
    size: tuple[int, int] = (1, 1)
    """Height and width that the axes count: those of the image it was made of."""
    sentence: str = ""


def image_panel(title: str, image: Picture) -> Panel:
    """An image by itself."""
    return Panel(title, enlarged(image), image.shape[:2])


@dataclass(frozen=True)
class Look:
    """How raw maps become pictures; the same for all panels of a figure.

    Args:
        style: "default" or "paper", see `i2am.plots.style`.
        threshold: Normalized values up to this are left out; None keeps all.
        shared: Whether the maps of a row have one scale, so that they can be compared.
        preset: As for `i2am.attribution.picture`.

    Raises:
        ValueError: The style or preset is unknown, or the threshold outside [0, 1).
    """

    style: str = "default"
    threshold: float | None = 0.4
    shared: bool = False
    preset: str | Preset = "paper"

    def __post_init__(self) -> None:
        check_style(self.style)
        get_preset(self.preset)
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must be None or in [0, 1), got {self.threshold}")

    def panels(self, titles: Sequence[str], image: Picture, maps: Tensor) -> list[Panel]:
        """Raw maps ``[n, height, width]`` over one image, each under its title."""
        constant = is_constant(maps).flatten().tolist()
        large = enlarged(image)
        return [
            Panel(
                f"{title} (the same everywhere)" if same else title,
                overlay(large, unit, style=self.style),
                image.shape[:2],
            )
            for title, unit, same in zip(titles, self._values(maps, large), constant, strict=True)
        ]

    def panel(self, title: str, image: Picture, maps: Tensor) -> Panel:
        """One raw map ``[height, width]`` over an image."""
        return self.panels([title], image, maps[None])[0]

    def _values(self, maps: Tensor, image: Picture) -> NDArray[np.floating]:
        height, width = image.shape[:2]
        drawn = picture(
            maps,
            (height, width),
            preset=self.preset,
            threshold=self.threshold,
            shared=self.shared,
        )
        return drawn.numpy()


def grid(
    rows: Sequence[Sequence[Panel | None]],
    look: Look,
    *,
    labels: Sequence[str] = (),
    heading: str | None = None,
) -> "tuple[Figure, list[list[Axes]]]":
    """A figure of panels in rows and columns, with the scale of the colours at its right.

    Args:
        rows: Panels; None and the places behind a short row stay empty.
        look: What the colours mean.
        labels: Text at the left of each row; none by default.
        heading: Text above everything.

    Returns:
        The figure and its panels' axes; pixel (x, y) of a panel covers x to x + 1 and y to y + 1.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure_type = _figure_type()
    columns = max(len(row) for row in rows)
    cells = [[*row, *[None] * (columns - len(row))] for row in rows]
    ratios = [
        max((_aspect(row[column]) for row in cells if row[column]), default=1.0)
        for column in range(columns)
    ]
    height = min(_PANEL, (_WIDTH - _BAR) / sum(ratios))
    titles = [
        [
            _wrapped(panel.title, ratio * height) if panel else ""
            for panel, ratio in zip(row, ratios, strict=True)
        ]
        for row in cells
    ]
    # what stands above already is not said again
    shown = [
        [
            "" if number and text == titles[number - 1][column] else text
            for column, text in enumerate(row)
        ]
        for number, row in enumerate(titles)
    ]
    lines = sum(max(title.count("\n") + bool(title) for title in row) for row in shown)
    width = height * sum(ratios) + 0.08 * columns + _BAR + (0.25 if any(labels) else 0)
    headline = _wrapped(heading or "", width * 0.94)
    tall = len(rows) * (height + 0.1) + lines * _LINE + 0.1
    tall += _LINE * (headline.count("\n") + 1.5) if heading else 0
    # room for the text along the scale
    tall = max(tall, 1.7)
    figure = figure_type(figsize=(width, tall), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False, width_ratios=ratios)
    for panels, texts, places in zip(cells, shown, axes, strict=True):
        for panel, text, place in zip(panels, texts, places, strict=True):
            _draw(place, panel, text)
    for label, places in zip(labels, axes, strict=bool(labels)):
        places[0].set_ylabel(label, fontsize=_TITLE)
    if heading:
        figure.suptitle(headline, fontsize=_TITLE)
    _color_bar(figure, axes, look, inches=min(2.4, 0.9 * tall), tall=tall)
    return figure, [list(places) for places in axes]


def _draw(place: "Axes", panel: Panel | None, title: str) -> None:
    place.set_xticks([])
    place.set_yticks([])
    if panel is None or panel.pixels is None:
        for spine in place.spines.values():
            spine.set_visible(False)
        if panel:
            place.set_title(title, fontsize=_TITLE)
            text = textwrap.fill(panel.sentence, 16)
            place.text(0.5, 0.5, text, ha="center", va="center", fontsize=_TITLE)
        return
    height, width = panel.size
    place.imshow(
        panel.pixels, origin="upper", interpolation="bicubic", extent=(0, width, height, 0)
    )
    for spine in place.spines.values():
        spine.set(visible=True, linewidth=0.5, color="0.4")
    place.set_title(title, fontsize=_TITLE)


def _color_bar(figure: "Figure", axes: NDArray, look: Look, *, inches: float, tall: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    table = color_table(look.style) / 255
    scale = ScalarMappable(Normalize(0, 1), ListedColormap(table))
    bar = figure.colorbar(scale, ax=axes, shrink=inches / tall, aspect=18, pad=0.02)
    bar.outline.set_linewidth(0.5)
    text = "one scale per row" if look.shared else "each map on its own scale"
    ticks = [0.0, 1.0]
    if look.threshold:
        ticks.insert(1, look.threshold)
        text += f",\nup to {look.threshold:g} left out"
        # what is left out is 0, and has the look of 0
        left_out = "white" if look.style == "default" else table[0]
        bar.ax.axhspan(0, look.threshold, facecolor=left_out, edgecolor="0.6", hatch="////", lw=0)
        bar.ax.axhline(look.threshold, color="black", lw=1)
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks], fontsize=_TITLE - 1)
    bar.set_label(text, fontsize=_TITLE - 1)


def _figure_type() -> "type[Figure]":
    try:
        from i2am.plots.shown import ShownFigure
    except ImportError as error:
        raise ImportError(
            f'figures need matplotlib ({error}); install it with: pip install "i2am[plots]"'
        ) from error
    return ShownFigure


def _aspect(panel: Panel | None) -> float:
    if panel is None or panel.pixels is None:
        return 0.75
    return panel.size[1] / panel.size[0]


def _wrapped(text: str, inches: float) -> str:
    """The text in lines of about one length that fit into a width."""
    letters = max(8, int(inches * 72 / (_TITLE * _LETTER)))
    lines = _lines(text, letters)
    if len(lines) > 1:
        even = _lines(text, min(letters, len(text) // len(lines) + 6))
        lines = even if len(even) == len(lines) else lines
    return "\n".join(line.strip() for line in lines)


def _lines(text: str, letters: int) -> list[str]:
    # behind spaces, and behind the dots in names of layers
    parts = re.split(r"(?<=\s)|(?<=\.)(?=\S)", text)
    lines = [""]
    for part in parts:
        for piece in (part[at : at + letters] for at in range(0, len(part), letters)):
            if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > letters:
                lines.append("")
            lines[-1] += piece
    return lines
