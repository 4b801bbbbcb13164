"""Figures of whole recordings: which maps of `AttributionMaps` go into which figure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from i2am.attribution.maps import AttributionMaps
from i2am.attribution.pictures import Which, cut_place, seen
from i2am.attribution.presets import Preset
from i2am.attribution.reduction import layers_of
from i2am.data.arrays import cut_picture
from i2am.plots import comparisons, pointing, splits
from i2am.plots.checks import rgb
from i2am.plots.reading import Reading, Votes, region_box
from i2am.plots.style import Picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = (
    "time_and_head",
    "time_groups",
    "heads",
    "reference_maps",
    "specific_reference",
    "layers",
    "models",
)
"""Names of the figures."""

NUMBERS = {
    "4": "time_and_head",
    "5": "time_groups",
    "6": "heads",
    "7": "heads",
    "8": "reference_maps",
    "9": "specific_reference",
}
"""The figures of the paper; 6 and 7 are both maps per head."""

ONE_EACH = ("reference_maps", "specific_reference", "layers")
"""Figures of a single recording; in the others each has its row or column."""


@dataclass(frozen=True)
class Recorded:
    """One generated image with its maps.

    Attributes:
        maps: Of this image alone, one sample.
        generated: uint8 ``[height, width, 3]``: array, tensor or PIL image; None where no figure
            needs it.
        reference: Likewise.
        label: What to call it beside others.
        truths: Where regions should look, as fractions of the reference, by their name.
    """

    maps: AttributionMaps
    generated: Any = None
    reference: Any = None
    label: str = ""
    truths: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.maps.n_samples != 1:
            raise ValueError(f"maps must be of one sample, got {self.maps.n_samples}")


def figure_name(which: str | int) -> str:
    """The name of a figure, given by name or by its number in the paper.

    Raises:
        ValueError: There is no such figure.
    """
    name = NUMBERS.get(str(which), str(which))
    if name not in FIGURES:
        raise ValueError(f"which must be 4 to 9 or one of {', '.join(FIGURES)}, got {which!r}")
    return name


def lacks(which: str, recorded: Sequence[Recorded]) -> str | None:
    """Why a figure cannot be made of these recordings, in words that follow "because"; or None."""
    if which == "models":
        return "it compares two recordings or more" if len(recorded) < 2 else None
    if which in ONE_EACH and len(recorded) > 1:
        return "it shows a single recording"
    for one in recorded:
        reading = Reading(one.maps)
        if which in ("reference_maps", "specific_reference"):
            if reading.spatial is None:
                return "no layer has reference patches"
            if not reading.has_g2r:
                return "G2R was not recorded"
        if which == "specific_reference" and not one.maps.regions:
            return "no region was recorded"
        if which == "layers" and any(layer.site.merged for layer in one.maps.layer_sums):
            return "layers were added up while recording (sums='resized')"
    return None


def figure(
    which: str | int,
    recorded: Sequence[Recorded],
    *,
    votes: Votes = "uniform",
    weights: Votes = "uniform",
    style: str = "default",
    threshold: float | None = 0.4,
    shared: bool = False,
    preset: str | Preset = "paper",
    heading: str | None = None,
) -> "Figure":
    """A figure of one recording or more.

    Args:
        which: Name or number, see `FIGURES` and `NUMBERS`.
        recorded: The recordings, in the order of rows or columns.
        votes: Which reference tokens vote in R2G.
        weights: Which generated patches count in G2R.
        style, threshold, shared, preset, heading: See `i2am.plots`.

    Raises:
        ValueError: `which` is unknown or cannot be made of these, an image that it needs is missing
            or no picture, or votes or weights were not recorded.
        ImportError: matplotlib is missing.
    """
    name = figure_name(which)
    if not recorded:
        raise ValueError("recorded must hold at least one recording, got none")
    if reason := lacks(name, recorded):
        raise ValueError(f"which={which!r} cannot be drawn, because {reason}")
    options: dict[str, Any] = {
        "style": style,
        "threshold": threshold,
        "preset": preset,
        "heading": heading,
    }
    if name not in ("time_and_head", "models"):
        options["shared"] = shared
    elif shared:
        raise ValueError(f"shared must be left out for {name}, whose rows have one map each")
    return _DRAW[name](_Source(recorded, votes, weights, preset), options)


class _Source:
    """Images and maps of several recordings, each maps as one list entry."""

    def __init__(
        self, recorded: Sequence[Recorded], votes: Votes, weights: Votes, preset: str | Preset
    ) -> None:
        self.recorded = recorded
        self.readings = [Reading(one.maps, preset) for one in recorded]
        self.labels = [one.label for one in recorded] if any(one.label for one in recorded) else []
        self._votes, self._weights = votes, weights

    def generated(self) -> list[Picture]:
        return [_image(one.generated, "generated", one.maps) for one in self.recorded]

    def references(self) -> list[Picture]:
        return [_image(one.reference, "reference", one.maps) for one in self.recorded]

    def r2g(self, per: str = "") -> list[Tensor]:
        every = [reading.r2g(per or (), votes=self._votes)[0].cpu() for reading in self.readings]
        # min-max of the negative is one minus the min-max
        return [
            -one if reading.invert else one
            for reading, one in zip(self.readings, every, strict=True)
        ]

    def g2r(self, per: str = "") -> list[Tensor | None]:
        """None where there are no reference patches, or it was not recorded."""
        return [
            reading.g2r(per or (), weights=self._weights)[0].cpu() if reading.has_g2r else None
            for reading in self.readings
        ]


Options = dict[str, Any]


def _time_and_head(source: _Source, options: Options) -> "Figure":
    if all(reading.has_g2r for reading in source.readings):
        options |= {"reference": source.references(), "reference_maps": source.g2r()}
    return comparisons.time_and_head(
        source.generated(), source.r2g(), labels=source.labels, **options
    )


def _time_groups(source: _Source, options: Options) -> "Figure":
    steps = [one.maps.provenance.get("steps") for one in source.recorded]
    return splits.time_groups(
        source.generated(), source.r2g("time"), steps=steps, labels=source.labels, **options
    )


def _heads(source: _Source, options: Options) -> "Figure":
    return splits.heads(source.generated(), source.r2g("head"), labels=source.labels, **options)


def _reference_maps(source: _Source, options: Options) -> "Figure":
    (one,), (reference,) = source.recorded, source.references()
    return splits.reference_maps(
        reference,
        source.g2r("time")[0],
        source.g2r("head")[0],
        steps=one.maps.provenance.get("steps"),
        **options,
    )


def _specific_reference(source: _Source, options: Options) -> "Figure":
    (one,), (reading,) = source.recorded, source.readings
    (generated,), (reference,) = source.generated(), source.references()
    height, width = generated.shape[:2]
    boxes = []
    for name in one.maps.regions:
        box = region_box(one.maps, name)
        boxes.append(box and (box[0] * height, box[1] * width, box[2] * height, box[3] * width))
    return pointing.specific_reference(
        generated,
        reference,
        torch.cat([reading.region(name) for name in one.maps.regions]),
        boxes,
        names=one.maps.regions,
        truths=[cut_place(one.truths.get(name), one.maps.provenance) for name in one.maps.regions],
        **options,
    )


def _layers(source: _Source, options: Options) -> "Figure":
    (reading,) = source.readings
    images, names = source.generated(), [_counted(reading.maps, reading)]
    maps: list[Tensor | None] = [*source.r2g("layer")]
    if reading.spatial and reading.has_g2r:
        images += source.references()
        maps += source.g2r("layer")
        names.append(_counted(reading.spatial, reading))
    titles = ("generated", "reference")[: len(images)]
    return splits.layers(
        images, maps, names, name=titles, labels=("R2G", "G2R")[: len(images)], **options
    )


def _models(source: _Source, options: Options) -> "Figure":
    return comparisons.models(
        [one.label or f"model {number}" for number, one in enumerate(source.recorded, 1)],
        source.generated(),
        source.r2g(),
        reference=source.references(),
        reference_maps=source.g2r(),
        **options,
    )


_DRAW: dict[str, Callable[[_Source, Options], "Figure"]] = {
    "time_and_head": _time_and_head,
    "time_groups": _time_groups,
    "heads": _heads,
    "reference_maps": _reference_maps,
    "specific_reference": _specific_reference,
    "layers": _layers,
    "models": _models,
}


def _counted(maps: AttributionMaps, reading: Reading) -> list[str]:
    return [layer.site.layer for layer in layers_of(maps.layer_sums, reading.preset)]


def _image(value: Any, name: Which, maps: AttributionMaps) -> Picture:
    """The part of the picture that the maps lie on."""
    from PIL import Image

    if value is None:
        raise ValueError(f"{name} must be the image that the maps lie on, got none")
    pixels, picture = rgb(value, name), seen(maps.provenance, name)
    if picture is None or picture.box is None:
        return pixels
    return np.asarray(cut_picture(Image.fromarray(pixels), picture.box))
