"""Figures of whole recordings: which maps of `AttributionMaps` go into which figure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from i2am.attribution.maps import AttributionMaps
from i2am.attribution.pictures import Which, cut_place, region_box, seen
from i2am.attribution.presets import Preset
from i2am.attribution.shown import ROWS, Shown, Votes
from i2am.attribution.sources import sources
from i2am.attribution.sums import Measure
from i2am.data.shapes import cut_picture
from i2am.plots import comparisons, pointing, splits
from i2am.plots.checks import rgb
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
"""Names of the figures of every recording."""

FURTHER = ("words", "frames")
"""Names of those of the words of a prompt, and of a video."""

NUMBERS = {
    "4": "time_and_head",
    "5": "time_groups",
    "6": "heads",
    "7": "heads",
    "8": "reference_maps",
    "9": "specific_reference",
}
"""The figures of the paper; 6 and 7 are both maps per head."""

ONE_EACH = ("reference_maps", "specific_reference", "layers", *FURTHER)
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
    if name not in (*FIGURES, *FURTHER):
        known = ", ".join((*FIGURES, *FURTHER))
        raise ValueError(f"which must be 4 to 9 or one of {known}, got {which!r}")
    return name


def lacks(which: str, recorded: Sequence[Recorded], source: str | None = None) -> str | None:
    """Why a figure cannot be made of these recordings, in words that follow "because"; or None."""
    if which == "models" and len(recorded) < 2:
        return "it compares two recordings or more"
    if which in ONE_EACH and len(recorded) > 1:
        return "it shows a single recording"
    for one in recorded:
        shown = Shown(one.maps, source=source)
        if shown.word and which in ("reference_maps", "specific_reference", "models"):
            return f"the word {shown.name} has no place on a reference"
        if which in ("reference_maps", "specific_reference"):
            if shown.placed is None:
                return "no layer has reference patches"
            if not shown.has_g2r:
                return "G2R was not recorded"
        if which == "specific_reference" and not one.maps.regions:
            return "no region was recorded"
        if which == "layers" and any(layer.site.merged for layer in one.maps.layer_sums):
            return "layers were added up while recording (sums='resized')"
        if which == "words" and not sources(one.maps.layer_sums, "text"):
            return "no words of the prompt were recorded, record(words=...)"
        if which == "frames" and shown.maps.frames == 1:
            return "it is of a picture, which has one frame"
    return None


def figure(
    which: str | int,
    recorded: Sequence[Recorded],
    *,
    source: str | None = None,
    votes: Votes = "uniform",
    measure: Measure | None = None,
    weights: Votes = "uniform",
    style: str = "default",
    threshold: float | None = 0.4,
    shared: bool = False,
    preset: str | Preset = "paper",
    heading: str | None = None,
) -> "Figure":
    """A figure of one recording or more.

    Args:
        which: Name or number, see `FIGURES`, `FURTHER` and `NUMBERS`.
        recorded: The recordings, in the order of rows or columns.
        source: Which of `AttributionMaps.sources`; None is the first of each.
        votes: Which reference tokens vote in R2G.
        measure: As for `AttributionMaps.reference_to_generated`.
        weights: Which generated patches count in G2R.
        style, threshold, shared, preset: See `i2am.plots`.
        heading: Text above the figure; by default what its maps are, where that is not simply the
            spread of the only reference of a picture.

    Raises:
        ValueError: `which` is unknown or cannot be made of these, an image that it needs is missing
            or no picture, or votes or weights were not recorded.
        ImportError: matplotlib is missing.
    """
    name = figure_name(which)
    if not recorded:
        raise ValueError("recorded must hold at least one recording, got none")
    if reason := lacks(name, recorded, source):
        raise ValueError(f"which={which!r} cannot be drawn, because {reason}")
    shown = [Shown(one.maps, preset, source) for one in recorded]
    rows = _Rows(recorded, shown, votes, weights, measure)
    options: dict[str, Any] = {
        "style": style,
        "threshold": threshold,
        "preset": preset,
        "heading": heading or rows.heading(name),
    }
    if name not in ("time_and_head", "models"):
        options["shared"] = shared
    elif shared:
        raise ValueError(f"shared must be left out for {name}, whose rows have one map each")
    return _DRAW[name](rows, options)


@dataclass
class _Rows:
    """Images and maps of several recordings, each maps as one list entry."""

    recorded: Sequence[Recorded]
    shown: Sequence[Shown]
    votes: Votes
    weights: Votes
    measure: Measure | None

    @property
    def labels(self) -> list[str]:
        labels = [one.label for one in self.recorded]
        return labels if any(labels) else []

    def generated(self) -> list[Picture]:
        return [_image(one.generated, "generated", one.maps) for one in self.recorded]

    def references(self) -> list[Picture]:
        return [_image(one.reference, "reference", one.maps) for one in self.recorded]

    def r2g(self, per: str = "") -> list[Tensor]:
        every = []
        for shown in self.shown:
            one = shown.r2g(per or (), votes=self.votes, measure=self.measure)[0].cpu()
            # min-max of the negative is one minus the min-max
            every.append(-one if shown.inverted(self.measure) else one)
        return every

    def g2r(self, per: str = "") -> list[Tensor | None]:
        """None where there are no reference patches, or it was not recorded."""
        return [
            shown.g2r(per or (), weights=self.weights)[0].cpu() if shown.has_g2r else None
            for shown in self.shown
        ]

    def heading(self, name: str) -> str | None:
        """What the maps of a figure are, where somebody could take them for others."""
        shown = self.shown[0]
        if name == "words":
            return f"R2G: share of attention to each word{shown.averaged}"
        if all(one.plain for one in self.shown) and self.measure != "share":
            return None
        if name in ("reference_maps", "specific_reference"):
            region = name == "specific_reference"
            return shown.g2r_title("only patches in the region" if region else ROWS[self.weights])
        title = shown.r2g_title(self.votes, self.measure)
        return title.removesuffix(shown.averaged) if name == "frames" else title


Options = dict[str, Any]


def _time_and_head(rows: _Rows, options: Options) -> "Figure":
    if all(shown.has_g2r for shown in rows.shown):
        options |= {"reference": rows.references(), "reference_maps": rows.g2r()}
    return comparisons.time_and_head(rows.generated(), rows.r2g(), labels=rows.labels, **options)


def _time_groups(rows: _Rows, options: Options) -> "Figure":
    steps = [one.maps.provenance.get("steps") for one in rows.recorded]
    return splits.time_groups(
        rows.generated(), rows.r2g("time"), steps=steps, labels=rows.labels, **options
    )


def _heads(rows: _Rows, options: Options) -> "Figure":
    return splits.heads(rows.generated(), rows.r2g("head"), labels=rows.labels, **options)


def _reference_maps(rows: _Rows, options: Options) -> "Figure":
    (one,), (reference,) = rows.recorded, rows.references()
    return splits.reference_maps(
        reference,
        rows.g2r("time")[0],
        rows.g2r("head")[0],
        steps=one.maps.provenance.get("steps"),
        **options,
    )


def _specific_reference(rows: _Rows, options: Options) -> "Figure":
    (one,), (shown,) = rows.recorded, rows.shown
    (generated,), (reference,) = rows.generated(), rows.references()
    height, width = generated.shape[:2]
    boxes = []
    for name in one.maps.regions:
        box = region_box(one.maps.provenance, name)
        boxes.append(box and (box[0] * height, box[1] * width, box[2] * height, box[3] * width))
    return pointing.specific_reference(
        generated,
        reference,
        torch.cat([shown.region(name) for name in one.maps.regions]),
        boxes,
        names=one.maps.regions,
        truths=[cut_place(one.truths.get(name), one.maps.provenance) for name in one.maps.regions],
        **options,
    )


def _layers(rows: _Rows, options: Options) -> "Figure":
    (shown,) = rows.shown
    images, names = rows.generated(), [shown.layers_of(placed=rows.votes == "mask")]
    maps: list[Tensor | None] = [*rows.r2g("layer")]
    if shown.has_g2r:
        images += rows.references()
        maps += rows.g2r("layer")
        names.append(shown.layers_of(placed=True))
    titles = ("generated", "reference")[: len(images)]
    return splits.layers(
        images, maps, names, name=titles, labels=("R2G", "G2R")[: len(images)], **options
    )


def _models(rows: _Rows, options: Options) -> "Figure":
    return comparisons.models(
        [one.label or f"model {number}" for number, one in enumerate(rows.recorded, 1)],
        rows.generated(),
        rows.r2g(),
        reference=rows.references(),
        reference_maps=rows.g2r(),
        **options,
    )


def _words(rows: _Rows, options: Options) -> "Figure":
    (one,), (shown,) = rows.recorded, rows.shown
    words = sources(one.maps.layer_sums, "text")
    maps = [Shown(one.maps, shown.preset, word).r2g(measure="share")[0].cpu() for word in words]
    return splits.strip(rows.generated()[0], torch.stack(maps), words, **options)


def _frames(rows: _Rows, options: Options) -> "Figure":
    (maps,) = rows.r2g("frame")
    titles = [f"latent frame {number}" for number in range(len(maps))]
    return splits.strip(rows.generated()[0], maps, titles, **options)


_DRAW: dict[str, Callable[[_Rows, Options], "Figure"]] = {
    "time_and_head": _time_and_head,
    "time_groups": _time_groups,
    "heads": _heads,
    "reference_maps": _reference_maps,
    "specific_reference": _specific_reference,
    "layers": _layers,
    "models": _models,
    "words": _words,
    "frames": _frames,
}


def _image(value: Any, name: Which, maps: AttributionMaps) -> Picture:
    """The part of the picture that the maps lie on."""
    from PIL import Image

    if value is None:
        raise ValueError(f"{name} must be the image that the maps lie on, got none")
    pixels, picture = rgb(value, name), seen(maps.provenance, name)
    if picture is None or picture.box is None:
        return pixels
    return np.asarray(cut_picture(Image.fromarray(pixels), picture.box))
