"""The picture files of one recording: which maps, over which image, under which title."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from i2am.attribution import AttributionMaps, picture
from i2am.attribution.postprocess import is_constant
from i2am.attribution.shown import ROWS, Shown
from i2am.cli.settings import Inputs, NamedBox
from i2am.plots import contact_sheet, overlay
from i2am.plots.overlay import SIDE, resized
from i2am.plots.titles import head_titles, step_titles

_SCALE = "Every map has its own scale from 0 to 1; values up to 0.4 are left out."


@dataclass(frozen=True)
class Scene:
    """What the maps are drawn over, and what to say about them.

    Attributes:
        inputs: The images the run was given.
        generated: The image it made.
        boxes: The regions asked for, in pixels of the person.
        steps: Denoising steps of the run.
        preset: How maps are read and drawn, "paper" or "official".
        caption: What made the image; begins the heading of every sheet.
    """

    inputs: Inputs
    generated: Image.Image
    boxes: tuple[NamedBox, ...]
    steps: int
    preset: str
    caption: str


class Tile(NamedTuple):
    """A picture in a sheet."""

    title: str
    pixels: NDArray[np.uint8]


class Sheet(NamedTuple):
    """A picture file."""

    name: str
    heading: str
    tiles: list[Tile]
    columns: int


def draw(folder: Path, maps: AttributionMaps, scene: Scene, *, suffix: str = "") -> list[str]:
    """Write every sheet and plain overlay that the maps allow.

    Args:
        folder: Where to write.
        maps: One sample or more; the first is drawn.
        scene: Images and texts.
        suffix: Put behind the name of every file.

    Returns:
        Names of the files, in the order to look at them.
    """
    written = []

    def save(name: str, pixels: NDArray[np.uint8]) -> None:
        written.append(f"{name}{suffix}.png")
        Image.fromarray(pixels).save(folder / written[-1])

    read = _Reader(maps.select(samples=[0]), scene)
    for sheet in _sheets(read, scene):
        pixels = contact_sheet(
            [tile.pixels for tile in sheet.tiles],
            [tile.title for tile in sheet.tiles],
            columns=sheet.columns,
            heading=f"{scene.caption}. {sheet.heading}",
        )
        save(sheet.name, pixels)
    for name, pixels in read.overlays():
        save(name, pixels)
    return written


def _sheets(read: "_Reader", scene: Scene) -> Iterator[Sheet]:
    inputs = scene.inputs
    person, mask, reference, generated = (
        Tile("person", _shown(inputs.person)),
        Tile("mask: white is painted anew", _shown(inputs.mask)),
        Tile("reference", _shown(inputs.reference)),
        Tile("generated", _shown(scene.generated)),
    )
    r2g, g2r = list(read.r2g()), list(read.g2r())
    yield Sheet("overview", _SCALE, [person, mask, reference, generated, *r2g, *g2r], 4)
    heading = "Where on the generated image the reference goes."
    yield Sheet("r2g", f"{heading} {_SCALE}", [generated, *r2g], 3)
    if g2r:
        heading = "Where on the reference the generated image looks."
        yield Sheet("g2r", f"{heading} {_SCALE}", [reference, *g2r], 3)
    heading = "Maps per group of denoising steps, the noisiest first."
    groups = list(read.time_groups())
    yield Sheet("time_groups", f"{heading} {_SCALE}", groups, min(10, read.maps.time_groups))
    heads = list(read.heads())
    heading = f"Maps per head, {read.shown.heads_of}."
    yield Sheet("heads", f"{heading} {_SCALE}", heads, min(8, read.shown.head_count))
    for box in scene.boxes if g2r else ():
        heading = f"Where on the reference the region {box.name} looks."
        yield Sheet(f"region_{box.name}", f"{heading} {_SCALE}", list(read.region(box)), 3)


class _Reader:
    """Maps as titled tiles."""

    def __init__(self, maps: AttributionMaps, scene: Scene) -> None:
        self.maps, self.scene = maps, scene
        self.shown = Shown(maps, scene.preset)
        self._r2g = {
            way: self.shown.r2g(votes=way.votes, measure=way.measure)[0] for way in self.shown.ways
        }
        self._g2r = {row: self.shown.g2r(weights=row)[0] for row in self.shown.weights}

    def r2g(self) -> Iterator[Tile]:
        """The share first, then one tile per vote vector."""
        for way, maps in self._r2g.items():
            title = self.shown.r2g_title(way.votes, way.measure)
            yield self._on_generated(title, maps, invert=self.shown.inverted(way.measure))

    def g2r(self) -> Iterator[Tile]:
        """One tile per weighting of the generated patches."""
        for row, maps in self._g2r.items():
            yield self._on_reference(self.shown.g2r_title(ROWS[row]), maps)

    def overlays(self) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        """Maps over their images at the size of those, nothing else in the picture."""
        generated = np.asarray(self.scene.generated.convert("RGB"))
        for way, maps in self._r2g.items():
            name = "overlay_r2g_mask_votes" if way.name == "r2g_mask" else f"overlay_{way.name}"
            yield name, self._over(generated, maps, invert=self.shown.inverted(way.measure))
        reference = np.asarray(self.scene.inputs.reference)
        for row, maps in self._g2r.items():
            name = "overlay_g2r" if row == "uniform" else f"overlay_g2r_{row}"
            yield name, self._over(reference, maps)

    def time_groups(self) -> Iterator[Tile]:
        """One tile per direction and time group."""
        titles = step_titles(self.maps.time_groups, self.scene.steps)
        yield from self._split("time", titles)

    def heads(self) -> Iterator[Tile]:
        """One tile per direction and head."""
        yield from self._split("head", head_titles(self.shown.head_count))

    def region(self, box: NamedBox) -> Iterator[Tile]:
        """The region on the person and the generated image, and its map on the reference."""
        yield Tile("person, region in red", self._framed(self.scene.inputs.person, box))
        yield Tile("generated, region in red", self._framed(self.scene.generated, box))
        maps = self.shown.region(box.name)[0]
        tile = self._on_reference("G2R: only patches in the region", maps)
        if box.truth is not None:
            tile = Tile(f"{tile.title}; ring: the true place", _ringed(tile.pixels, box.truth))
        yield tile

    def _split(self, axis: str, titles: list[str]) -> Iterator[Tile]:
        for title, one in zip(titles, self.shown.r2g(axis)[0], strict=True):
            yield self._on_generated(f"R2G, {title}", one, invert=self.shown.inverted())
        if self._g2r:
            for title, one in zip(titles, self.shown.g2r(axis)[0], strict=True):
                yield self._on_reference(f"G2R, {title}", one)

    def _framed(self, image: Image.Image, box: NamedBox) -> NDArray[np.uint8]:
        shown = Image.fromarray(_shown(image))
        across = shown.width / self.scene.inputs.person.width
        down = shown.height / self.scene.inputs.person.height
        left, top = box.left * across, box.top * down
        right, bottom = left + box.width * across, top + box.height * down
        corners = (left - 1, top - 1, right, bottom)
        ImageDraw.Draw(shown).rectangle(corners, outline="white", width=4)
        ImageDraw.Draw(shown).rectangle(corners, outline="red", width=2)
        return np.asarray(shown)

    def _on_generated(self, title: str, maps: Tensor, *, invert: bool) -> Tile:
        return self._tile(title, maps, self.scene.generated, invert=invert)

    def _on_reference(self, title: str, maps: Tensor) -> Tile:
        return self._tile(title, maps, self.scene.inputs.reference)

    def _tile(self, title: str, maps: Tensor, image: Image.Image, *, invert: bool = False) -> Tile:
        if bool(is_constant(maps)):
            title += " (the same everywhere)"
        return Tile(title, self._over(_shown(image), maps, invert=invert))

    def _over(
        self, pixels: NDArray[np.uint8], maps: Tensor, *, invert: bool = False
    ) -> NDArray[np.uint8]:
        height, width = pixels.shape[:2]
        values = picture(maps, (height, width), preset=self.shown.preset, invert=invert)
        return overlay(pixels, values.cpu().numpy())


def _ringed(pixels: NDArray[np.uint8], place: tuple[float, float]) -> NDArray[np.uint8]:
    """A ring around ``place``, fractions of the height and the width."""
    shown = Image.fromarray(pixels)
    y, x = place[0] * shown.height, place[1] * shown.width
    draw = ImageDraw.Draw(shown)
    for radius, color, width in ((13, "white", 5), (12, "black", 2)):
        corners = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(corners, outline=color, width=width)
    return np.asarray(shown)


def _shown(image: Image.Image) -> NDArray[np.uint8]:
    """RGB pixels whose longer side is `SIDE`."""
    return resized(np.asarray(image.convert("RGB")), SIDE)
