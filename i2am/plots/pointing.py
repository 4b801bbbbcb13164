"""Where single patches of the generated image looked on the reference."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from numpy.typing import ArrayLike
from torch import Tensor

from i2am.attribution.presets import Preset
from i2am.plots.checks import one_each, pictures, same_number
from i2am.plots.panels import Look, grid, image_panel
from i2am.plots.style import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Box = tuple[float, float, float, float]
"""Top, left, height, width."""


def specific_reference(
    generated: ArrayLike,
    reference: ArrayLike,
    maps: ArrayLike,
    boxes: Sequence[Box | None],
    *,
    names: Sequence[str] = (),
    truths: Sequence[tuple[float, float] | None] = (),
    style: str = "default",
    threshold: float | None = 0.4,
    shared: bool = False,
    preset: str | Preset = "paper",
    heading: str | None = None,
) -> "Figure":
    """Where single patches looked (figure 9): a red box, and an arrow to the peak of its map.

    Args:
        generated: The generated image.
        reference: The reference image.
        maps: Specific-reference maps ``[regions, height, width]``.
        boxes: Top, left, height, width of each region in pixels of the generated image; None draws
            neither box nor arrow.
        names: What to call each region.
        truths: Where each should look, as fractions of the reference's height and width, if known:
            a ring.
        style, threshold, shared, preset, heading: See `i2am.plots`.
    """
    look = Look(style, threshold, shared, preset)
    (image,), (below,) = pictures([generated], "generated"), pictures([reference], "reference")
    (raw,) = one_each(maps, below, name="maps", image="reference", axes=("regions",))
    same_number("boxes", boxes, "maps", len(raw))
    for index, box in enumerate(boxes):
        _check_box(box, image, f"boxes[{index}]")
    names, truths = names or [""] * len(raw), truths or [None] * len(raw)
    same_number("names", names, "maps", len(raw))
    same_number("truths", truths, "maps", len(raw))
    for index, truth in enumerate(truths):
        if truth is not None and not all(0 <= part <= 1 for part in truth):
            raise ValueError(f"truths[{index}] must be fractions in [0, 1], got {truth}")
    titles = ["where it looked" + ("; ring: true place" if truth else "") for truth in truths]
    targets = look.panels(titles, below, raw)
    pairs = [
        [image_panel(name or "generated", image), target]
        for name, target in zip(names, targets, strict=True)
    ]
    # two regions in a row
    across = 1 if len(pairs) == 1 else 2
    rows = [
        [panel for pair in pairs[at : at + across] for panel in pair]
        for at in range(0, len(pairs), across)
    ]
    figure, axes = grid(rows, look, heading=heading)
    for number, (box, truth, one) in enumerate(zip(boxes, truths, raw, strict=True)):
        row, column = divmod(number, across)
        start, end = axes[row][2 * column : 2 * column + 2]
        if box is not None:
            _mark(figure, start, end, box, _peak(one, below))
        if truth is not None:
            _ring(end, truth, below)
    return figure


def _check_box(box: Box | None, image: Picture, name: str) -> None:
    if box is None:
        return
    height, width = image.shape[:2]
    inside = len(box) == 4 and min(box) >= 0 and min(box[2:]) > 0
    if not inside or box[0] + box[2] > height or box[1] + box[3] > width:
        raise ValueError(
            f"{name} must be (top, left, height, width) inside the {height} x {width} generated "
            f"image, got {tuple(box)}"
        )


def _peak(maps: Tensor, image: Picture) -> tuple[float, float]:
    """Centre of the largest cell, as x and y in pixels of the image."""
    height, width = maps.shape
    row, column = divmod(int(maps.flatten().argmax()), width)
    return (column + 0.5) * image.shape[1] / width, (row + 0.5) * image.shape[0] / height


def _mark(
    figure: "Figure",
    start: "Axes",
    end: "Axes",
    box: Box,
    peak: tuple[float, float],
) -> None:
    from matplotlib.patches import ConnectionPatch, Rectangle

    top, left, height, width = box
    for color, line in (("white", 2.5), ("red", 1.2)):
        start.add_patch(Rectangle((left, top), width, height, fill=False, ec=color, lw=line))
    figure.add_artist(
        ConnectionPatch(
            (left + width, top + height / 2),
            peak,
            coordsA=start.transData,
            coordsB=end.transData,
            arrowstyle="-|>",
            mutation_scale=8,
            color="red",
            lw=1,
        )
    )


def _ring(place: "Axes", truth: tuple[float, float], image: Picture) -> None:
    height, width = image.shape[:2]
    at = ([truth[1] * width], [truth[0] * height])
    for color, line in (("white", 3), ("black", 1.2)):
        place.plot(*at, marker="o", ms=13, mfc="none", mec=color, mew=line, ls="none")
