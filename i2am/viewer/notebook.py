"""How results show themselves in a notebook."""

import base64
import html
from collections.abc import Iterator
from io import BytesIO
from typing import TYPE_CHECKING, Any

from i2am.attribution import AttributionMaps, picture
from i2am.attribution.postprocess import is_constant
from i2am.attribution.shown import Shown
from i2am.viewer.html import frame
from i2am.viewer.report import page
from i2am.wording import counted

if TYPE_CHECKING:
    from torch import Tensor

_SAMPLES = 4
_SIDE = 192  # of a map, in pixels


class View:
    """The page of a recording, which a notebook shows in a frame of its own.

    Args:
        maps: The recording. With pair maps, ``record(pairs=True)``, any patch can be pointed at.
        height: Of the frame, in pixels.
        **options: Images and all else that `i2am.viewer.page` takes.

    Attributes:
        page: The HTML document.

    Raises:
        ValueError: As :func:`i2am.viewer.page`.

    Example:
        >>> View(maps, generated=image, reference=garment)  # doctest: +SKIP
    """

    def __init__(self, maps: AttributionMaps, *, height: int = 880, **options: Any) -> None:
        self.page = page(maps, **options)
        self.height = height

    def _repr_html_(self) -> str:
        return frame(self.page, height=self.height)


def maps_html(maps: AttributionMaps) -> str:
    """Maps of every source of the first samples as pictures, below what ``repr`` says of them.

    Args:
        maps: The recording; nothing of it is changed.

    Returns:
        HTML without scripts.
    """
    lines = [f"<pre>{html.escape(repr(maps))}</pre>"]
    for sample in range(min(maps.n_samples, _SAMPLES)):
        one = maps.select(samples=sample)
        figures = [
            f'<figure style="display: inline-block; margin: 0 1em 1em 0">'
            f'<img alt="{title}" style="image-rendering: pixelated; height: {_SIDE}px" '
            f'src="data:image/png;base64,{_png(values)}">'
            f'<figcaption style="max-width: {_SIDE}px; font-size: smaller">{title}{flat}'
            "</figcaption></figure>"
            for title, values, flat in _overall(one)
        ]
        lines.append("".join(figures))
    if (more := maps.n_samples - _SAMPLES) > 0:
        lines.append(f"<p>and {counted(more, 'more sample')}</p>")
    return "\n".join(lines)


def _overall(maps: AttributionMaps) -> "Iterator[tuple[str, Tensor, str]]":
    """Of every source the R2G to show first, and G2R."""
    for source in maps.sources:
        shown, found = Shown(maps, source=source), []
        for way in shown.ways[:1]:
            title = shown.r2g_title(way.votes, way.measure)
            found.append((title, shown.r2g(votes=way.votes, measure=way.measure)[0]))
        if shown.has_g2r:
            found.append((shown.g2r_title(), shown.g2r()[0]))
        for title, sums in found:
            flat = " (the same everywhere)" if bool(is_constant(sums)) else ""
            yield html.escape(title), picture(sums, (sums.shape[-2], sums.shape[-1])), flat


def _png(values: "Tensor") -> str:
    from PIL import Image

    from i2am.plots import heat

    file = BytesIO()
    Image.fromarray(heat(values.cpu().numpy())).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
