"""Maps split along one axis: time groups, heads, layers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from numpy.typing import ArrayLike
from torch import Tensor

from i2am.attribution.presets import Preset
from i2am.plots.checks import Images, Maps, one_each, pictures, same_number
from i2am.plots.panels import Look, Panel, grid, image_panel
from i2am.plots.style import Picture
from i2am.plots.titles import head_titles, layer_titles, step_titles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MANY = 8
"""Maps in a row; more of one image go on in the next."""


def time_groups(
    image: Images,
    maps: Maps,
    *,
    steps: int | Sequence[int | None] | None = None,
    name: str | Sequence[str] = "generated",
    labels: Sequence[str] = (),
    style: str = "default",
    threshold: float | None = 0.4,
    shared: bool = False,
    preset: str | Preset = "paper",
    heading: str | None = None,
) -> "Figure":
    """Maps per group of denoising steps, the noisiest first (figure 5).

    Args:
        image: What the maps lie on: generated images for R2G, reference images for G2R.
        maps: ``[time groups, height, width]`` of each.
        steps: Denoising steps of the run, or of each row's; titles then count steps rather than
            groups.
        name: Title of the image, or one for each row.
        labels: What to call each row.
        style, threshold, shared, preset, heading: See `i2am.plots`.
    """
    look = Look(style, threshold, shared, preset)
    rows = _checked(image, maps, "time groups")
    counts = list(steps) if isinstance(steps, Sequence) else [steps] * len(rows)
    same_number("steps", counts, "rows", len(rows))
    titles = [step_titles(len(row.maps), count) for row, count in zip(rows, counts, strict=True)]
    return _split(rows, titles, name, labels, look, heading)


def heads(
    image: Images,
    maps: Maps,
    *,
    name: str | Sequence[str] = "generated",
    labels: Sequence[str] = (),
    style: str = "default",
    threshold: float | None = 0.4,
    shared: bool = False,
    preset: str | Preset = "paper",
    heading: str | None = None,
) -> "Figure":
    """Maps per attention head (figures 6 and 7).

    Args:
        image: What the maps lie on.
        maps: ``[heads, height, width]`` of each image.
        name: Title of the image, or one for each row.
        labels: What to call each row.
        style, threshold, shared, preset, heading: See `i2am.plots`.
    """
    look = Look(style, threshold, shared, preset)
    rows = _checked(image, maps, "heads")
    titles = [head_titles(len(row.maps)) for row in rows]
    return _split(rows, titles, name, labels, look, heading)


def layers(
    image: Images,
    maps: Maps,
    names: Sequence[str] | Sequence[Sequence[str]],
    *,
    name: str | Sequence[str] = "generated",
    labels: Sequence[str] = (),
    style: str = "default",
    threshold: float | None = 0.4,
    shared: bool = False,
    preset: str | Preset = "paper",
    heading: str | None = None,
) -> "Figure":
    """Maps per layer.

    Args:
        image: What the maps lie on.
        maps: ``[layers, height, width]`` of each image.
        names: Paths of the layers, or of each row's; what all end with is left out of the titles.
        name: Title of the image, or one for each row.
        labels: What to call each row.
        style, threshold, shared, preset, heading: See `i2am.plots`.
    """
    look = Look(style, threshold, shared, preset)
    rows = _checked(image, maps, "layers")
    several: Any = names
    paths = [several] * len(rows) if all(isinstance(one, str) for one in names) else list(several)
    same_number("names", paths, "rows", len(rows))
    for row, path in zip(rows, paths, strict=True):
        same_number("names", path, "layers", len(row.maps))
    return _split(rows, [layer_titles(path) for path in paths], name, labels, look, heading)


def reference_maps(
    reference: ArrayLike,
    time_maps: Maps,
    head_maps: Maps,
    *,
    steps: int | None = None,
    style: str = "default",
    threshold: float | None = 0.4,
    shared: bool = False,
    preset: str | Preset = "paper",
    heading: str | None = None,
) -> "Figure":
    """Maps on the reference over time, and over heads (figure 8).

    Args:
        reference: The reference image.
        time_maps: G2R ``[time groups, height, width]``.
        head_maps: G2R ``[heads, height, width]``.
        steps: As for `time_groups`.
        style, threshold, shared, preset, heading: See `i2am.plots`.
    """
    look = Look(style, threshold, shared, preset)
    (image,) = pictures([reference], "reference")
    over_time, over_heads = (
        one_each(maps, image, name=argument, image="reference", axes=(axis,))[0]
        for argument, maps, axis in (
            ("time_maps", time_maps, "time groups"),
            ("head_maps", head_maps, "heads"),
        )
    )
    rows = [_Row(image, over_time), _Row(image, over_heads)]
    titles = [step_titles(len(over_time), steps), head_titles(len(over_heads))]
    return _split(rows, titles, "reference", ("time", "heads"), look, heading)


def strip(
    image: ArrayLike,
    maps: Maps,
    titles: Sequence[str],
    *,
    style: str = "default",
    threshold: float | None = 0.4,
    shared: bool = False,
    preset: str | Preset = "paper",
    heading: str | None = None,
) -> "Figure":
    """Maps over one image, each under a title of its own: words of a prompt, frames of a video.

    Args:
        image: What the maps lie on.
        maps: ``[n, height, width]``.
        titles: One per map.
        style, threshold, shared, preset, heading: See `i2am.plots`.
    """
    look = Look(style, threshold, shared, preset)
    rows = _checked([image], [maps], "titles")
    same_number("titles", titles, "maps", len(rows[0].maps))
    return _split(rows, [titles], "generated", (), look, heading)


class _Row(NamedTuple):
    image: Picture
    maps: Tensor


def _checked(image: Images, maps: Maps, axis: str) -> list[_Row]:
    raw = one_each(maps, image, name="maps", image="image", axes=(axis,))
    return [_Row(*pair) for pair in zip(pictures(image, "image"), raw, strict=True)]


def _split(
    rows: Sequence[_Row],
    titles: Sequence[Sequence[str]],
    name: str | Sequence[str],
    labels: Sequence[str],
    look: Look,
    heading: str | None,
) -> "Figure":
    """A row per image: the image, then its maps, in further rows where they are many."""
    if labels:
        same_number("labels", labels, "rows", len(rows))
    image_titles = [name] * len(rows) if isinstance(name, str) else list(name)
    same_number("name", image_titles, "rows", len(rows))
    panels: list[list[Panel | None]] = []
    texts: list[str] = []
    every = zip(rows, image_titles, titles, labels or [""] * len(rows), strict=True)
    for row, title, words, label in every:
        drawn = look.panels(words, row.image, row.maps)
        for at in range(0, len(drawn), _MANY):
            first = None if at else image_panel(title, row.image)
            panels.append([first, *drawn[at : at + _MANY]])
            texts.append("" if at else label)
    return grid(panels, look, labels=texts if any(texts) else (), heading=heading)[0]
