"""Whole maps of several runs: with and without guidance, and of several models."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from numpy.typing import ArrayLike

from i2am.attribution.presets import Preset
from i2am.plots.checks import Images, Maps, one_each, pictures, raw_maps, same_number
from i2am.plots.panels import Look, Panel, grid, image_panel

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def time_and_head(
    generated: Images,
    maps: Maps,
    *,
    reference: Images = None,
    reference_maps: Maps = None,
    labels: Sequence[str] = (),
    style: str = "default",
    threshold: float | None = 0.4,
    preset: str | Preset = "paper",
    heading: str | None = None,
) -> "Figure":
    """Time-and-head integrated maps (figure 4): a row per run, with and without guidance say.

    Args:
        generated: Generated images.
        maps: R2G of each, ``[height, width]``.
        reference: Reference images, where `reference_maps` are given.
        reference_maps: G2R of each, ``[height, width]``.
        labels: What to call each row: ``("with guidance", "without guidance")``.
        style, threshold, preset, heading: See `i2am.plots`.
    """
    look = Look(style, threshold, preset=preset)
    images = pictures(generated, "generated")
    r2g = one_each(maps, generated, name="maps", image="generated", axes=())
    rows = [
        [image_panel("generated", image), look.panel("R2G", image, one)]
        for image, one in zip(images, r2g, strict=True)
    ]
    if (reference is None) != (reference_maps is None):
        raise ValueError("reference and reference_maps must be given together, got one of them")
    if reference is not None:
        references = pictures(reference, "reference")
        same_number("reference", references, "generated", len(images))
        g2r = one_each(reference_maps, reference, name="reference_maps", image="reference", axes=())
        for row, image, one in zip(rows, references, g2r, strict=True):
            row += [image_panel("reference", image), look.panel("G2R", image, one)]
    if labels:
        same_number("labels", labels, "rows", len(rows))
    return grid(rows, look, labels=labels, heading=heading)[0]


def models(
    names: Sequence[str],
    generated: Images,
    maps: Maps,
    *,
    reference: Images,
    reference_maps: Sequence[ArrayLike | None],
    style: str = "default",
    threshold: float | None = 0.4,
    preset: str | Preset = "paper",
    heading: str | None = None,
) -> "Figure":
    """Models side by side: a column each with its image, R2G, reference and G2R.

    Args:
        names: What to call each model.
        generated: The image of each.
        maps: R2G of each, ``[height, width]``.
        reference: The reference image of each; a single one is everybody's.
        reference_maps: G2R of each, ``[height, width]``, or None where there is none: it does not
            exist with a single reference token.
        style, threshold, preset, heading: See `i2am.plots`.
    """
    look = Look(style, threshold, preset=preset)
    images = pictures(generated, "generated")
    r2g = one_each(maps, generated, name="maps", image="generated", axes=())
    references = pictures(reference, "reference")
    if len(references) == 1:
        references *= len(images)
    same_number("names", names, "generated", len(images))
    same_number("reference", references, "generated", len(images))
    same_number("reference_maps", reference_maps, "generated", len(images))
    g2r = [
        None if one is None else raw_maps(one, f"reference_maps[{index}]")
        for index, one in enumerate(reference_maps)
    ]
    rows = [
        [image_panel(name, image) for name, image in zip(names, images, strict=True)],
        [look.panel("", image, one) for image, one in zip(images, r2g, strict=True)],
        [image_panel("", image) for image in references],
        [
            Panel("", None, sentence="no G2R") if one is None else look.panel("", image, one)
            for image, one in zip(references, g2r, strict=True)
        ],
    ]
    labels = ("generated", "R2G", "reference", "G2R")
    return grid(rows, look, labels=labels, heading=heading)[0]
