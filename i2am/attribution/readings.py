"""Every way of reading what a run recorded."""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch import Tensor

from i2am.attribution.direction import Direction
from i2am.attribution.flow import Flow, read_flow
from i2am.attribution.grid import Box, Grid, Patch
from i2am.attribution.layers import conditional, multiplied, recorded, shares
from i2am.attribution.pairs import PairMaps
from i2am.attribution.presets import Preset, get_preset
from i2am.attribution.reduction import (
    LayerWeighting,
    find_region,
    kept_axes,
    layers_of,
    missing_for_official,
    read,
    refuse_gridless,
    refuse_mean_heads,
    undeclared,
)
from i2am.attribution.sources import default_measure, received_of, spread_of
from i2am.attribution.sums import LayerSums, Measure

PerAxes = str | Iterable[str]


class Readings:
    """The reading methods of :class:`AttributionMaps`."""

    layer_sums: tuple[LayerSums, ...]
    votes: tuple[str, ...]
    rows: tuple[str, ...]
    provenance: dict[str, Any]
    pairs: PairMaps | None
    _warned = False

    @property
    def regions(self) -> tuple[str, ...]:
        """Names that :meth:`specific_reference` knows."""
        return tuple(row for row in self.rows if row not in ("uniform", "mask"))

    def reference_to_generated(
        self,
        per: PerAxes = (),
        *,
        size: Grid | None = None,
        source: str | None = None,
        measure: Measure | None = None,
        votes: Literal["uniform", "mask"] = "uniform",
        values: Literal["one", "norm"] = "one",
        preset: str | Preset = "paper",
        layer_weighting: LayerWeighting = "paper",
    ) -> Tensor:
        """R2G: where on the generated image the reference tokens go (eqs 4-7, 10, 11).

        There are two measures: ``"share"``, the part of each patch's attention that goes to the
        reference tokens, or to those in the reference mask, as the model spends it: a mean over
        steps, layers and heads in [0, 1], which predicts what the reference did to the image; 1
        everywhere where the reference is all that a layer attends to. And ``"spread"``, the
        paper's: how each token would divide one unit over the generated image, a sum over the
        recorded steps.

        With ``values="norm"`` every token counts in the share by ``|| W_o v ||``, the norm of what
        it brings through the output projection of its head, instead of 1: a small model's maps were
        then as right without a reference mask as its shares were with one. It is a mean too, and
        its unit is that of a layer's output.

        What a layer multiplies its branch by, the scale and mask of an IP-Adapter, multiplies its
        map.

        Under ``preset="official"`` maps are resized bicubic and clamped per head and key before
        they are averaged. That is exact for one reference token, and for more where the recording
        kept the keys apart and let prefix tokens vote; otherwise the mean over keys comes first and
        a warning, once per object, says what is missing. Mask votes are not in the published code;
        for them the mean over keys always comes first.

        Args:
            per: Axes to keep.
            size: Grid of the result; by default the finest generated grid.
            source: A reference or word of :attr:`sources`; default all references together: the sum
                of their shares, and the spread of all their tokens alike.
            measure: ``"share"`` or ``"spread"``; default the share of words, and of references in
                one sequence with the generated image (joint attention), else the spread, as the
                paper has it; ``preset="official"`` always reads the spread.
            votes: Which reference tokens count: all alike, or by the recorded reference mask.
            values: How much a token counts: ``"one"`` or, of the share alone, ``"norm"``, see
                above; needs ``record(values="norm")``.
            preset: ``"paper"``, ``"official"`` or a :class:`Preset`. Official leaves out the mid
                block and, of StableVITON's warp blocks, all but number 4, also from the layer axis.
            layer_weighting: ``"paper"`` averages layers as they are, so coarse ones weigh more;
                ``"area"`` multiplies each by its number of cells first.

        Returns:
            fp32 ``[samples, (time), (layer), (head), *size]``, not normalized.

        Raises:
            ValueError: If the direction, the norms or the mask votes were not recorded, mask votes
                are asked of a layer without a reference grid, ``per`` keeps heads of layers with
                different head counts or that were not kept apart, or an argument is unknown.
        """
        if votes not in self.votes:
            raise ValueError(
                f"votes must be recorded ones, got {votes!r}; recorded: {', '.join(self.votes)} "
                "('mask' needs record(reference_mask=...))"
            )
        if measure not in (None, "share", "spread"):
            raise ValueError(f"measure must be 'share' or 'spread', got {measure!r}")
        if values not in ("one", "norm"):
            raise ValueError(f"values must be 'one' or 'norm', got {values!r}")
        if values == "norm":
            if measure == "spread":
                raise ValueError("values='norm' is of measure='share', got measure='spread'")
            measure = "share"
        vote = self.votes.index(votes)
        preset = get_preset(preset)
        layers = spread_of(self.layer_sums, source, masked=votes == "mask")
        measure = measure or default_measure(layers, preset)
        if votes == "mask":
            refuse_gridless(layers, "reference_to_generated(votes='mask')", preset)
        elif preset.clamp_after_grid_resize and measure == "spread":
            self._warn_approximate(layers, preset, size)
        axes = kept_axes(per)
        apart = "time" in axes
        if measure == "spread" and "head" in axes:
            refuse_mean_heads(layers_of(layers, preset))

        def sums(layer: LayerSums) -> Tensor:
            if measure == "share":
                held = shares(layer, apart=apart, values=values)[:, :, :, vote]
                return held if layer.site.frames > 1 else held[:, :, :, None]
            by_key = layer.reference_to_generated_by_key
            if preset.clamp_after_grid_resize and votes == "uniform" and by_key is not None:
                return multiplied(by_key, layer.multiplier)
            held = recorded(layer, Direction.REFERENCE_TO_GENERATED)[:, :, :, vote]
            held = held if layer.site.frames > 1 else held[:, :, :, None]
            return multiplied(held, layer.multiplier)

        return read(layers, sums, per, size, preset, layer_weighting)

    def generated_to_reference(
        self,
        per: PerAxes = (),
        *,
        size: Grid | None = None,
        source: str | None = None,
        weights: Literal["uniform", "mask"] = "uniform",
        normalise: Literal["full", "conditional"] = "full",
        preset: str | Preset = "paper",
        layer_weighting: LayerWeighting = "paper",
    ) -> Tensor:
        """G2R: where on the reference image the generated patches look (eqs 12-15, 17).

        Args:
            per: Axes to keep.
            size: Grid of the result; by default the finest reference grid.
            source: A reference of :attr:`sources`; needed where there are several.
            weights: Which generated patches count: all alike, or by the inpainting mask (eq 17).
            normalise: ``"full"``: a patch counts by the part of its attention that goes to the
                reference. ``"conditional"``: where patches look given that they look at the
                reference, so that each of them counts alike; needs
                ``record(normalise="conditional")`` where layers attend to more.
            preset: As in :meth:`reference_to_generated`; exact for official where no layer is
                resized.
            layer_weighting: As in :meth:`reference_to_generated`.

        Returns:
            fp32 ``[samples, (time), (layer), (head), *size]``, not normalized.

        Raises:
            ValueError: If a layer has no reference grid, so that the map does not exist, the
                direction, the mask weights or the conditional were not recorded, ``per`` keeps
                heads of layers with different head counts, or an argument is unknown.
        """
        if normalise not in ("full", "conditional"):
            raise ValueError(f"normalise must be 'full' or 'conditional', got {normalise!r}")
        if weights not in ("uniform", "mask"):
            raise ValueError(f"weights must be 'uniform' or 'mask', got {weights!r}")
        if weights not in self.rows:
            raise ValueError(
                f"weights={weights!r} was not recorded; it needs record(mask=...), "
                "the inpainting mask"
            )
        return self._read_row(
            weights, per, size, source, preset, layer_weighting, conditionally=normalise != "full"
        )

    def flow(
        self,
        per: PerAxes = (),
        *,
        size: Grid | None = None,
        source: str | None = None,
        preset: str | Preset = "paper",
        layer_weighting: LayerWeighting = "paper",
    ) -> Flow:
        """Where on the reference every generated patch looks, and how sure it is.

        The mean over the attention that goes to the reference: of ``P`` times the place of each
        reference token, summed over steps, heads and layers, divided by the sum of ``P``.

        Args:
            per: Axes to keep.
            size: Grid of the result; by default the finest generated grid.
            source: A reference of :attr:`sources`; needed where there are several.
            preset: As in :meth:`reference_to_generated`.
            layer_weighting: As in :meth:`reference_to_generated`.

        Returns:
            ``(place, spread, share)``, see :class:`Flow`.

        Raises:
            ValueError: If places were not recorded, ``record(flow=True)``, or an argument is
                unknown.
        """
        preset = get_preset(preset)
        layers = received_of(self.layer_sums, source)
        share = self.reference_to_generated(
            per,
            size=size,
            source=layers[0].site.source,
            measure="share",
            preset=preset,
            layer_weighting=layer_weighting,
        )
        return read_flow(
            layers,
            lambda sums: read(layers, sums, per, size, preset, layer_weighting),
            share,
        )

    def specific_reference(
        self,
        region: str | Patch | Box,
        per: PerAxes = (),
        *,
        size: Grid | None = None,
        source: str | None = None,
        preset: str | Preset = "paper",
        layer_weighting: LayerWeighting = "paper",
    ) -> Tensor:
        """G2R of one region of the generated image: where on the reference it looks (eq 16).

        Args:
            region: A region that was declared before the run: its name, or the :class:`Patch` or
                :class:`Box` itself, whatever name it was given. A :class:`Patch` of the grid of
                :attr:`pairs` need not have been declared.
            per: Axes to keep; of a patch read from :attr:`pairs` one of time and head at most.
            size: Grid of the result; by default the finest reference grid.
            source: As in :meth:`generated_to_reference`.
            preset: As in :meth:`generated_to_reference`; a patch from :attr:`pairs` needs bilinear
                maps of all layers, those of ``"paper"``.
            layer_weighting: As in :meth:`generated_to_reference`; likewise ``"paper"``.

        Returns:
            fp32 ``[samples, (time), (layer), (head), *size]``, not normalized. From :attr:`pairs`
            it is the mean of the layers with a reference grid, on the pair grid, resized.

        Raises:
            ValueError: If the region was not declared, nor is it a cell of :attr:`pairs` that can
                be read so, or as :meth:`generated_to_reference` does.
        """
        descriptions = self.provenance.get("regions") or {}
        name = find_region(region, self.regions, descriptions)
        if name is not None:
            return self._read_row(name, per, size, source, preset, layer_weighting)
        cell = None if self.pairs is None else self.pairs.cell(region)
        if self.pairs is None or cell is None:
            pairs = None if self.pairs is None else self.pairs.generated_grid
            raise undeclared(region, self.regions, descriptions, pairs)
        grids = [layer.site.reference_grid or (1, 1) for layer in self.layer_sums]
        sites = [layer.site for layer in self.layer_sums if layer.site.reference_grid is not None]
        return self.pairs.read_cell(
            cell,
            kept_axes(per),
            size=size or max(grids, key=math.prod),
            preset=get_preset(preset),
            layer_weighting=layer_weighting,
            tags={tag for site in sites for tag in site.tags},
        )

    def _read_row(
        self,
        row: str,
        per: PerAxes,
        size: Grid | None,
        source: str | None,
        preset: str | Preset,
        layer_weighting: LayerWeighting,
        *,
        conditionally: bool = False,
    ) -> Tensor:
        index = self.rows.index(row)
        preset = get_preset(preset)
        layers = received_of(self.layer_sums, source)
        refuse_gridless(layers, "generated_to_reference", preset)

        def sums(layer: LayerSums) -> Tensor:
            held = recorded(layer, Direction.GENERATED_TO_REFERENCE)
            held = (conditional(layer) if conditionally else held)[:, :, :, index, None]
            if layer.multiplier is None:
                return held
            multiplier = layer.multiplier.mean((-2, -1)).to(held.device)
            return held * multiplier[:, None, None, None, None]

        return read(layers, sums, per, size, preset, layer_weighting)

    def _warn_approximate(
        self, layers: Sequence[LayerSums], preset: Preset, size: Grid | None
    ) -> None:
        missing = missing_for_official(layers_of(layers, preset), self.provenance, size)
        if missing and not self._warned:
            self._warned = True
            warnings.warn(
                f"preset {preset.name!r} is approximate here, because the recording lacks "
                f"{' and '.join(missing)}",
                stacklevel=3,
            )
