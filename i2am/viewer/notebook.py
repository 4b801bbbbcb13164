"""How results show themselves in a notebook."""

import base64
import html
from collections.abc import Iterator
from io import BytesIO
from typing import TYPE_CHECKING, Any

from i2am.attribution import AttributionMaps, Direction, picture
from i2am.attribution.postprocess import is_constant
from i2am.viewer.html import frame
from i2am.viewer.report import page
from i2am.wording import counted

if TYPE_CHECKING:
    from torch import Tensor

_SAMPLES = 4
_SIDE = 192  # of a map, in pixels
_TITLES = {
    Direction.REFERENCE_TO_GENERATED: "R2G: where on the generated image the reference goes",
    Direction.GENERATED_TO_REFERENCE: "G2R: where on the reference the generated image looks",
}
_SHARE = {
    "uniform": "R2G: share of attention that goes to the reference",
    "mask": "R2G: share of attention that goes to the object in the reference mask",
}


class View:
    """The page of a recording, which a notebook shows in a frame of its own.

    Args:
        maps: The recording. With joint maps, ``record(joint=True)``, any patch can be pointed at.
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
    """Both maps of the first samples as pictures, below what the maps say of themselves.

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
    spatial = [layer.site.layer for layer in maps.layer_sums if layer.site.reference_grid]
    for direction in maps.directions:
        title = _TITLES[direction]
        if direction is Direction.REFERENCE_TO_GENERATED and (votes := maps.share_of):
            placed = maps.select(layers=spatial) if votes == "mask" else maps
            sums = placed.reference_to_generated(measure="share", votes=votes)[0]
            title = _SHARE[votes]
        elif direction is Direction.REFERENCE_TO_GENERATED:
            sums = maps.reference_to_generated()[0]
        elif spatial:
            sums = maps.select(layers=spatial).generated_to_reference()[0]
        else:
            continue
        flat = " (the same everywhere)" if bool(is_constant(sums)) else ""
        yield title, picture(sums, (sums.shape[-2], sums.shape[-1])), flat


def _png(values: "Tensor") -> str:
    from PIL import Image

    from i2am.plots import heat

    file = BytesIO()
    Image.fromarray(heat(values.cpu().numpy())).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
