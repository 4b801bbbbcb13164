"""What is shown of a recording: which layers, heads and R2G of a source, under which titles."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor

from i2am.attribution.direction import Direction
from i2am.attribution.layers import shares
from i2am.attribution.presets import Preset, get_preset
from i2am.attribution.reduction import layers_of
from i2am.attribution.sources import combined, default_measure, sources
from i2am.attribution.sums import LayerSums, Measure

if TYPE_CHECKING:
    from i2am.attribution.maps import AttributionMaps

Votes = Literal["uniform", "mask"]

ROWS: dict[Votes, str] = {
    "uniform": "all generated patches",
    "mask": "only patches in the mask",
}
"""Which patches look in G2R, in titles."""


class R2G(NamedTuple):
    """A way of reading R2G: its name in pages, ``"share"``, ``"r2g"`` or ``"r2g_mask"``, and the
    arguments of the reading."""

    name: str
    votes: Votes
    measure: Measure


class Shown:
    """One source of a recording, as pictures, pages and scores read it.

    A source may have layers of several kinds. Maps on the reference come from those that have a
    reference grid, and so do R2G maps whose votes are the reference mask's, because tokens without
    a place are in no mask. Maps per head come from the layers with as many heads as the finest.

    Args:
        maps: What was recorded.
        preset: How it is read, "paper", "official" or a `Preset`.
        source: Which of ``maps.sources``; None is the first.

    Attributes:
        maps: Of the source alone.
        preset, source: As given.
        word: Whether the source is a word of the prompt.
        layers: Paths of the layers that count.
        gridless: Those of them whose tokens have no place.
        placed: `maps` of the others, or None.
        has_g2r: Whether these recorded G2R.
        single: Whether the source is a single reference token in every layer.
        invert: Whether R2G, where it is a spread, is to be drawn as ``1 - map``.
        measure: How R2G is read by default.
        alike: Whether all layers have one head count.
        head_count: Heads of a map per head.
        heads_of: Which layers such a map averages.

    Raises:
        ValueError: The preset is unknown or leaves out every layer, or there is no such source.
    """

    def __init__(
        self, maps: "AttributionMaps", preset: str | Preset = "paper", source: str | None = None
    ) -> None:
        names = maps.sources
        self.preset, self.source = get_preset(preset), names[0] if source is None else source
        # itself where it can be, so that it warns once
        self.maps = maps if names == (self.source,) else maps.select(source=self.source)
        self._sites = [layer.site for layer in layers_of(self.maps.layer_sums, self.preset)]
        self.word = self._sites[0].role == "text"
        self._named = self.word or len(sources(maps.layer_sums, "reference")) > 1
        self.layers = [site.layer for site in self._sites]
        self.gridless = [site.layer for site in self._sites if site.reference_grid is None]
        self.placed = None if len(self.gridless) == len(self.layers) else self._select(placed=True)
        recorded = self.placed.directions if self.placed else ()
        self.has_g2r = Direction.GENERATED_TO_REFERENCE in recorded
        self.single = not self.word and all(site.reference_tokens == 1 for site in self._sites)
        self.invert = self.preset.invert_single_token and self.single
        self.measure = default_measure(self.maps.layer_sums, self.preset)
        finest = max(self._sites, key=lambda site: math.prod(site.generated_grid))
        self.head_count = finest.heads
        alike = [site.layer for site in self._sites if site.heads == finest.heads]
        self.alike = len(alike) == len(self._sites)
        self.heads_of = f"averaged over {len(alike)} of {len(self._sites)} layers"

    # What can be read

    @cached_property
    def ways(self) -> tuple[R2G, ...]:
        """Every R2G that says something, the one to show first first: the share, of the object in
        the reference mask where that is known, then the spread."""
        if Direction.REFERENCE_TO_GENERATED not in self.maps.directions:
            return ()
        votes = share_votes(self.maps.layer_sums, self.maps.votes)
        found = [] if votes is None else [R2G("share", votes, "share")]
        # of a word the spread says nothing that its share does not
        if not (self.word and found):
            found.append(R2G("r2g", "uniform", "spread"))
        if not self.word and self.placed is not None and "mask" in self.maps.votes:
            found.append(R2G("r2g_mask", "mask", "spread"))
        return tuple(found)

    @property
    def weights(self) -> tuple[Votes, ...]:
        """Which generated patches look, in the G2R maps that there are."""
        return tuple(rows for rows in ROWS if self.has_g2r and rows in self.maps.rows)

    def inverted(self, measure: Measure | None = None) -> bool:
        """Whether R2G is to be drawn as ``1 - map``."""
        return self.invert and (measure or self.measure) == "spread"

    def axes(self, way: R2G | None = None) -> tuple[str, ...]:
        """Which axes all layers can be read by, of a way of reading R2G, or of G2R."""
        spread = way is not None and way.measure == "spread"
        whole = self.alike and not (spread and any(one.spread_over_heads for one in self._sites))
        apart = not any(site.merged for site in self._sites)
        return ("time", *["head"] * whole, *["layer"] * apart)

    def r2g(
        self,
        per: str | tuple[str, ...] = (),
        *,
        votes: Votes = "uniform",
        measure: Measure | None = None,
    ) -> Tensor:
        """R2G, ``[samples, (axes), height, width]``.

        Raises:
            ValueError: As `AttributionMaps.reference_to_generated` does.
        """
        return self._select(placed=votes == "mask", per=per).reference_to_generated(
            per=per,
            source=self.source,
            votes=votes,
            measure=measure or self.measure,
            preset=self.preset,
        )

    def g2r(self, per: str | tuple[str, ...] = (), *, weights: Votes = "uniform") -> Tensor:
        """G2R, ``[samples, (axes), height, width]``.

        Raises:
            ValueError: As `AttributionMaps.generated_to_reference` does.
        """
        maps = self._select(placed=True, per=per)
        return maps.generated_to_reference(per=per, weights=weights, preset=self.preset)

    def region(self, name: str, per: str | tuple[str, ...] = ()) -> Tensor:
        """The specific-reference map of a region, ``[samples, (axes), height, width]``.

        Raises:
            ValueError: As `AttributionMaps.specific_reference` does.
        """
        maps = self._select(placed=True, per=per)
        return maps.specific_reference(name, per=per, preset=self.preset)

    def layers_of(self, *, placed: bool) -> list[str]:
        """Layers along the axis of ``per="layer"``."""
        return [name for name in self.layers if not placed or name not in self.gridless]

    # What it is called

    @property
    def name(self) -> str:
        """The source in a sentence: a word in quotes, the reference where there is no other."""
        if self.word:
            return f'"{self.source}"'
        return self.source if self._named else "the reference"

    @property
    def plain(self) -> bool:
        """Whether it is the spread of the only reference of a picture, which needs no name."""
        return not self._named and self.maps.frames == 1 and self.measure == "spread"

    def r2g_title(self, votes: Votes = "uniform", measure: Measure | None = None) -> str:
        """What an R2G map is."""
        if (measure or self.measure) == "share":
            return f"R2G: share of attention to {self.aim(votes)}{self.averaged}"
        if votes == "mask":
            of = f" of {self.name}" if self._named else ""
            return f"R2G: only tokens in the reference mask{of} vote{self.averaged}"
        of = f"token of {self.name}" if self._named else "reference token"
        return f"R2G: every {of} votes{self.averaged}"

    def g2r_title(self, what: str = ROWS["uniform"]) -> str:
        """What a G2R map is; `what` says which patches look."""
        return f"G2R: {what}{f' on {self.name}' if self._named else ''}{self.averaged}"

    def aim(self, votes: Votes) -> str:
        """What a share goes to."""
        if votes == "mask":
            return f"the object of {self.name}" if self._named else "the object"
        return self.name

    @property
    def averaged(self) -> str:
        """What titles of a video end with."""
        return f", mean over {self.maps.frames} frames" if self.maps.frames > 1 else ""

    def _select(self, *, placed: bool, per: str | tuple[str, ...] = ()) -> "AttributionMaps":
        per_head = "head" in ([per] if isinstance(per, str) else per)
        chosen = [
            site.layer
            for site in self._sites
            if (site.reference_grid or not placed)
            and (not per_head or site.heads == self.head_count)
        ]
        # none: the reading says what is missing
        whole = len(chosen) in (0, len(self._sites))
        return self.maps if whole else self.maps.select(layers=chosen)


def share_votes(layers: Sequence[LayerSums], votes: Sequence[str]) -> Votes | None:
    """Which votes' attention share says most, see :attr:`AttributionMaps.share_of`."""
    references = [layer for layer in layers if layer.site.role == "reference"]
    asked = references or layers
    if any(layer.attention_share is None for layer in asked):
        return None
    if "mask" in votes and any(layer.site.reference_grid for layer in references):
        return "mask"
    words = [layer for layer in asked if layer.site.source == asked[0].site.source]
    beside = any(
        bool((shares(layer, apart=False)[:, :, :, 0] < 1 - 1e-4).any())
        for layer in (combined(references) if references else words)
    )
    return "uniform" if beside else None
