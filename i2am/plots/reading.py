"""How maps are read for pictures: which layers, which of them inverted, what regions cover."""

import math
import re
from typing import Literal

from torch import Tensor

from i2am.attribution.direction import Direction
from i2am.attribution.maps import AttributionMaps
from i2am.attribution.presets import Preset, get_preset
from i2am.attribution.reduction import layers_of
from i2am.attribution.sums import Measure

Votes = Literal["uniform", "mask"]

_BOX = re.compile(r"(\d+),(\d+),(\d+),(\d+)@(\d+)x(\d+)")
_PATCH = re.compile(r"(\d+),(\d+)@(\d+)x(\d+)")


class Reading:
    """One result, read for pictures.

    A result may have layers of several kinds. Maps on the reference come from those that have a
    reference grid, and so do R2G maps whose votes are the reference mask's, because tokens without
    a place are in no mask. Maps per head come from the layers with as many heads as the finest.

    Args:
        maps: What was recorded.
        preset: How it is read, "paper", "official" or a `Preset`.

    Attributes:
        maps, preset: As given.
        spatial: `maps` of the layers with a reference grid, or None.
        has_g2r: Whether these recorded G2R.
        invert: Whether R2G is to be drawn as ``1 - map``.
        head_count: Heads of a map per head.
        heads_of: Which layers such a map averages.

    Raises:
        ValueError: The preset is unknown or leaves out every layer.
    """

    def __init__(self, maps: AttributionMaps, preset: str | Preset = "paper") -> None:
        self.maps, self.preset = maps, get_preset(preset)
        self.spatial = with_reference_grid(maps)
        recorded = self.spatial.directions if self.spatial else ()
        self.has_g2r = Direction.GENERATED_TO_REFERENCE in recorded
        counted = [layer.site for layer in layers_of(maps.layer_sums, self.preset)]
        single = all(site.reference_tokens == 1 for site in counted)
        self.invert = self.preset.invert_single_token and single
        finest = max(counted, key=lambda site: math.prod(site.generated_grid))
        alike = [site.layer for site in counted if site.heads == finest.heads]
        self.head_count = finest.heads
        self.heads_of = f"averaged over {len(alike)} of {len(counted)} layers"
        self._alike = maps.select(layers=alike)

    def r2g(
        self,
        per: str | tuple[str, ...] = (),
        *,
        votes: Votes = "uniform",
        measure: Measure = "spread",
    ) -> Tensor:
        """R2G, ``[samples, (axis), height, width]``.

        Raises:
            ValueError: As `AttributionMaps.reference_to_generated` does.
        """
        maps = self._alike if per == "head" else self.maps
        if votes == "mask":
            maps = with_reference_grid(maps) or maps
        return maps.reference_to_generated(
            per=per, votes=votes, measure=measure, preset=self.preset
        )

    def g2r(self, per: str | tuple[str, ...] = (), *, weights: Votes = "uniform") -> Tensor:
        """G2R, ``[samples, (axis), height, width]``.

        Raises:
            ValueError: As `AttributionMaps.generated_to_reference` does.
        """
        maps = self._alike if per == "head" else self.maps
        maps = with_reference_grid(maps) or maps
        return maps.generated_to_reference(per=per, weights=weights, preset=self.preset)

    def region(self, name: str) -> Tensor:
        """The specific-reference map of a region, ``[samples, height, width]``.

        Raises:
            ValueError: As `AttributionMaps.specific_reference` does.
        """
        maps = self.spatial or self.maps
        return maps.specific_reference(name, preset=self.preset)


def with_reference_grid(maps: AttributionMaps) -> AttributionMaps | None:
    """The layers whose reference tokens have a place; None if there is no such layer."""
    names = [layer.site.layer for layer in maps.layer_sums if layer.site.reference_grid]
    return maps.select(layers=names) if names else None


def region_box(maps: AttributionMaps, name: str) -> tuple[float, float, float, float] | None:
    """What a region covers: top, left, height, width as fractions of the generated image.

    Args:
        maps: Recorded with that region.
        name: Its name.

    Returns:
        None for a region of free weights, which has no rectangle.
    """
    # a region without an entry is named by what it is
    text = str((maps.provenance.get("regions") or {}).get(name, name))
    if found := _BOX.fullmatch(text):
        top, left, tall, wide, height, width = map(int, found.groups())
        return top / height, left / width, tall / height, wide / width
    if found := _PATCH.fullmatch(text):
        row, column, height, width = map(int, found.groups())
        return row / height, column / width, 1 / height, 1 / width
    return None
