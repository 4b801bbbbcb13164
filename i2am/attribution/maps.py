"""``AttributionMaps``: what a run recorded, and every way of reading it."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from i2am.attribution.direction import Direction
from i2am.attribution.grid import Box, Grid, Patch
from i2am.attribution.joint import JointMaps, concatenate_joint
from i2am.attribution.layers import (
    apply,
    check_layers,
    multiplied,
    nonfinite,
    recorded,
    shares,
    tensors,
)
from i2am.attribution.merging import check_mergeable, concatenate, merge_provenance
from i2am.attribution.presets import Preset, get_preset
from i2am.attribution.reading import (
    LayerWeighting,
    find_region,
    kept_axes,
    layers_of,
    missing_for_official,
    read,
    refuse_gridless,
    undeclared,
)
from i2am.attribution.sources import combined, of_source, received_of, sources, spread_of
from i2am.attribution.summary import summary
from i2am.attribution.sums import LayerSums

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PerAxes = str | Iterable[str]
Measure = Literal["share", "spread"]


class AttributionMaps:
    """fp32 sums per sample, time group, layer and head on native grids, read in any combination.

    Reading means choosing the axes to keep with `per`, any subset of ``"time"``, ``"layer"``,
    ``"head"`` and ``"frame"`` (one name or several). The others are reduced as in eqs 5-6 and 13-14
    of the paper: summed over time groups, averaged over heads, layers and the frames of a video. A
    result is fp32 ``[samples, (time), (layer), (head), (frame), height, width]``, kept axes always
    in this order.

    Args:
        layers: Sums of at least one layer, as :meth:`Accumulator.layers` gives them.
        votes: Names along the votes axis of R2G: ``("uniform",)`` or ``("uniform", "mask")``.
        rows: Names along the rows axis of G2R: ``"uniform"``, then ``"mask"`` if an inpainting
            mask was given, then one name per region.
        provenance: JSON values that say where the maps come from.
        joint: Every patch against every patch, where ``record(joint=...)`` asked for it.

    Attributes:
        layer_sums: The raw sums, one :class:`LayerSums` per layer.
        votes, rows, provenance, joint: As given.

    Raises:
        ValueError: If `layers` is empty or repeats a layer, or the shape of a tensor contradicts
            its site, the other layers, `votes`, `rows` or `joint`.
    """

    def __init__(
        self,
        layers: Sequence[LayerSums],
        *,
        votes: tuple[str, ...],
        rows: tuple[str, ...],
        provenance: Mapping[str, Any],
        joint: JointMaps | None = None,
    ) -> None:
        self.layer_sums = tuple(layers)
        self.votes = tuple(votes)
        self.rows = tuple(rows)
        self.provenance = dict(provenance)
        check_layers(self.layer_sums, self.votes, self.rows)
        any_sums = next(iter(tensors(self.layer_sums[0]).values()))
        self._n_samples, self._time_groups = any_sums.shape[:2]
        self.joint = joint
        if joint is not None and (joint.n_samples, joint.time_groups) != any_sums.shape[:2]:
            raise ValueError(
                f"joint must hold {self._n_samples} samples and {self._time_groups} time groups, "
                f"got {joint.n_samples} and {joint.time_groups}"
            )
        self._warned = False

    # What there is

    @property
    def n_samples(self) -> int:
        """Number of generated images."""
        return self._n_samples

    @property
    def time_groups(self) -> int:
        """Number of groups the denoising steps fall into, noisiest first."""
        return self._time_groups

    @property
    def layers(self) -> tuple[str, ...]:
        """Layer paths, in the order of ``per="layer"``."""
        return tuple(dict.fromkeys(layer.site.layer for layer in self.layer_sums))

    @property
    def sources(self) -> tuple[str, ...]:
        """What was recorded of: references, then words of the prompt."""
        return sources(self.layer_sums)

    @property
    def words(self) -> dict[str, Tensor]:
        """The attention share of every recorded word, ``[samples, height, width]`` by its name."""
        return {
            name: self.reference_to_generated(source=name, measure="share")
            for name in sources(self.layer_sums, role="text")
        }

    @property
    def frames(self) -> int:
        """Number of latent frames of a video, 1 for pictures."""
        return max(layer.site.frames for layer in self.layer_sums)

    @property
    def regions(self) -> tuple[str, ...]:
        """Names that :meth:`specific_reference` knows."""
        return tuple(row for row in self.rows if row not in ("uniform", "mask"))

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Directions that at least one layer recorded."""
        return tuple(
            direction
            for direction in Direction
            if any(direction.value in tensors(layer) for layer in self.layer_sums)
        )

    @property
    def causal(self) -> bool:
        """Whether every layer's output depends on the attention its map shows.

        False where a layer has a single reference token: its softmax over keys is 1 whatever the
        queries are, so its R2G map shows logits that the model never used.
        """
        return all(layer.site.causal for layer in self.layer_sums)

    @property
    def share_of(self) -> Literal["uniform", "mask"] | None:
        """Which votes' attention share says most: that of the tokens in the reference mask; without
        one that of all reference tokens, where layers attend to others as well; None where it was
        not recorded or is 1 everywhere."""
        references = [layer for layer in self.layer_sums if layer.site.role == "reference"]
        recorded = [layer for layer in references if layer.attention_share is not None]
        if len(recorded) < len(references) or not references:
            return None
        if "mask" in self.votes and any(layer.site.reference_grid for layer in recorded):
            return "mask"
        together = combined(recorded)
        beside = any(
            bool((shares(layer, apart=False)[:, :, :, 0] < 1 - 1e-4).any()) for layer in together
        )
        return "uniform" if beside else None

    def nonfinite(self) -> list[str]:
        """Where values are NaN or infinite: one line per place, empty if all is well."""
        return nonfinite(self.layer_sums) + (self.joint.nonfinite() if self.joint else [])

    # Reading

    def reference_to_generated(
        self,
        per: PerAxes = (),
        *,
        size: Grid | None = None,
        source: str | None = None,
        measure: Measure = "spread",
        votes: Literal["uniform", "mask"] = "uniform",
        preset: str | Preset = "paper",
        layer_weighting: LayerWeighting = "paper",
    ) -> Tensor:
        """R2G: where on the generated image the reference tokens go (eqs 4-7, 10, 11).

        Two measures: ``"share"``, the part of each patch's attention that goes to the reference
        tokens, or to those in the reference mask, as the model spends it: a mean over steps, layers
        and heads in [0, 1], which predicts what the reference did to the image; 1 everywhere where
        the reference is all that a layer attends to. And ``"spread"``, the paper's: how each token
        would divide one unit over the generated image, a sum over the recorded steps.

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
            measure: ``"share"`` or ``"spread"``.
            votes: Which reference tokens count: all alike, or by the recorded reference mask.
            preset: ``"paper"``, ``"official"`` or a :class:`Preset`. Official leaves out the mid
                block and, of StableVITON's warp blocks, all but number 4, also from the layer axis.
            layer_weighting: ``"paper"`` averages layers as they are, so coarse ones weigh more;
                ``"area"`` multiplies each by its number of cells first.

        Returns:
            fp32 ``[samples, (time), (layer), (head), *size]``, not normalized.

        Raises:
            ValueError: If the direction or the mask votes were not recorded, mask votes are asked
                of a layer without a reference grid, ``per`` keeps heads of layers with different
                head counts, or an argument is unknown.
        """
        if votes not in self.votes:
            raise ValueError(
                f"votes must be recorded ones, got {votes!r}; recorded: {', '.join(self.votes)} "
                "('mask' needs record(reference_mask=...))"
            )
        if measure not in ("share", "spread"):
            raise ValueError(f"measure must be 'share' or 'spread', got {measure!r}")
        vote = self.votes.index(votes)
        preset = get_preset(preset)
        layers = spread_of(self.layer_sums, source, masked=votes == "mask")
        if votes == "mask":
            refuse_gridless(layers, "reference_to_generated(votes='mask')", preset)
        elif preset.clamp_after_grid_resize and measure == "spread":
            self._warn_approximate(layers, preset, size)
        apart = "time" in kept_axes(per)

        def sums(layer: LayerSums) -> Tensor:
            if measure == "share":
                held = shares(layer, apart=apart)[:, :, :, vote]
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
        preset: str | Preset = "paper",
        layer_weighting: LayerWeighting = "paper",
    ) -> Tensor:
        """G2R: where on the reference image the generated patches look (eqs 12-15, 17).

        Args:
            per: Axes to keep.
            size: Grid of the result; by default the finest reference grid.
            source: A reference of :attr:`sources`; needed where there are several.
            weights: Which generated patches count: all alike, or by the inpainting mask (eq 17).
            preset: As in :meth:`reference_to_generated`; exact for official where no layer is
                resized.
            layer_weighting: As in :meth:`reference_to_generated`.

        Returns:
            fp32 ``[samples, (time), (layer), (head), *size]``, not normalized.

        Raises:
            ValueError: If a layer has no reference grid, so that the map does not exist, the
                direction or the mask weights were not recorded, ``per`` keeps heads of layers with
                different head counts, or an argument is unknown.
        """
        if weights not in ("uniform", "mask"):
            raise ValueError(f"weights must be 'uniform' or 'mask', got {weights!r}")
        if weights not in self.rows:
            raise ValueError(
                f"weights={weights!r} was not recorded; it needs record(mask=...), "
                "the inpainting mask"
            )
        return self._read_row(weights, per, size, source, preset, layer_weighting)

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
                :attr:`joint` need not have been declared.
            per: Axes to keep; of a patch read from :attr:`joint` one of time and head at most.
            size: Grid of the result; by default the finest reference grid.
            source: As in :meth:`generated_to_reference`.
            preset: As in :meth:`generated_to_reference`; a patch from :attr:`joint` needs bilinear
                maps of all layers, those of ``"paper"``.
            layer_weighting: As in :meth:`generated_to_reference`; likewise ``"paper"``.

        Returns:
            fp32 ``[samples, (time), (layer), (head), *size]``, not normalized. From :attr:`joint`
            it is the mean of the layers with a reference grid, on the joint one, resized.

        Raises:
            ValueError: If the region was not declared, nor is it a cell of :attr:`joint` that can
                be read so, or as :meth:`generated_to_reference` does.
        """
        descriptions = self.provenance.get("regions") or {}
        name = find_region(region, self.regions, descriptions)
        if name is not None:
            return self._read_row(name, per, size, source, preset, layer_weighting)
        cell = None if self.joint is None else self.joint.cell(region)
        if self.joint is None or cell is None:
            joint = None if self.joint is None else self.joint.generated_grid
            raise undeclared(region, self.regions, descriptions, joint)
        grids = [layer.site.reference_grid or (1, 1) for layer in self.layer_sums]
        return self.joint.read_cell(
            cell,
            kept_axes(per),
            size=size or max(grids, key=math.prod),
            preset=get_preset(preset),
            layer_weighting=layer_weighting,
        )

    # Subsets, batches, devices

    def select(
        self,
        layers: str | Iterable[str] | None = None,
        samples: int | slice | Sequence[int] | None = None,
        source: str | None = None,
    ) -> "AttributionMaps":
        """The same maps for some layers, samples or one source only.

        :attr:`joint` is an average over layers, so it does not survive a choice of them.

        Args:
            layers: Layer paths or patterns such as ``"up_blocks.*"``; None keeps all. The order of
                the layers does not change.
            samples: Index, slice or indices along the sample axis, in the order wanted; None keeps
                all. The axis stays for a single index too.
            source: One of :attr:`sources`; None keeps all.

        Returns:
            Maps with copies of the chosen samples; with all samples, memory is shared.

        Raises:
            ValueError: If a path or pattern matches no layer, or nothing is left.
            IndexError: If a sample index is out of range.
        """
        chosen: Sequence[LayerSums] = self.layer_sums
        joint = self.joint if layers is None else None
        if source is not None:
            chosen = of_source(chosen, source)
            joint = joint if chosen[0].site.role == "reference" else None
        if layers is not None:
            patterns = [layers] if isinstance(layers, str) else list(layers)
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in self.layers):
                    raise ValueError(
                        f"layers must match recorded ones, got {pattern!r}; "
                        f"recorded: {', '.join(self.layers)}"
                    )
            chosen = [
                layer
                for layer in chosen
                if any(fnmatchcase(layer.site.layer, pattern) for pattern in patterns)
            ]
            if not chosen:
                raise ValueError("layers must name at least one layer, got none")
        if samples is not None:
            every = range(self.n_samples)
            if isinstance(samples, slice):
                wanted = list(every[samples])
            else:
                wanted = [every[i] for i in ([samples] if isinstance(samples, int) else samples)]
            if not wanted:
                raise ValueError(f"samples must leave at least one of {len(every)}, got {samples}")
            chosen = apply(lambda sums: sums[wanted], chosen)
            joint = joint and joint.apply(lambda sums: sums[wanted])
        return self._with(chosen, joint)

    def to(self, device: torch.device | str) -> "AttributionMaps":
        """The same maps on another device."""
        layers = apply(lambda sums: sums.to(device), self.layer_sums)
        return self._with(layers, self.joint and self.joint.apply(lambda sums: sums.to(device)))

    @classmethod
    def merge(cls, results: Iterable["AttributionMaps"]) -> "AttributionMaps":
        """The samples of several results, batches of one job say, in one.

        Provenance that all agree on is kept; what differs is listed under ``"merged"``, one entry
        per result.

        Args:
            results: At least one result.

        Returns:
            Maps whose sample axis is the concatenation.

        Raises:
            ValueError: If `results` is empty, or they differ in layers, grids, heads, time groups,
                votes, rows, recorded sums, guidance, layout, the votes of prefix tokens, what a
                region's name stands for, or joint maps.
        """
        results = list(results)
        if not results:
            raise ValueError("results must hold at least one AttributionMaps, got none")
        check_mergeable(results)
        layers = concatenate([result.layer_sums for result in results])
        return cls(
            layers,
            votes=results[0].votes,
            rows=results[0].rows,
            provenance=merge_provenance([result.provenance for result in results]),
            joint=concatenate_joint([result.joint for result in results if result.joint]),
        )

    # Pictures

    def plot(
        self,
        which: str | int,
        *,
        generated: Any = None,
        reference: Any = None,
        sample: int = 0,
        votes: Literal["uniform", "mask"] = "uniform",
        weights: Literal["uniform", "mask"] = "uniform",
        style: str = "default",
        threshold: float | None = 0.4,
        shared: bool = False,
        preset: str | Preset = "paper",
        heading: str | None = None,
    ) -> "Figure":
        """A figure of one sample; for several, and for more freedom, see :mod:`i2am.plots`.

        Args:
            which: A figure of the paper, 4 to 9, or its name: ``"time_and_head"``,
                ``"time_groups"``, ``"heads"``, ``"reference_maps"``, ``"specific_reference"``;
                or ``"layers"``.
            generated: The generated image, uint8 ``[height, width, 3]``: array, tensor or PIL
                image. Figures 4 to 7, 9 and layers need it.
            reference: The reference image, likewise. Figures 4, 8, 9 and layers need it where the
                maps have a reference grid.
            sample: Which generated image.
            votes: As for :meth:`reference_to_generated`.
            weights: As for :meth:`generated_to_reference`.
            style: ``"default"`` or ``"paper"``.
            threshold: Normalized values up to this are left out; None keeps all.
            shared: One scale for all maps of a row, so that they can be compared.
            preset: How maps are read and drawn.
            heading: Text above the figure.

        Returns:
            A figure made without pyplot; ``figure.savefig("heads.png")`` writes it.

        Raises:
            ValueError: If the figure is unknown or cannot be drawn of these maps, an image is
                missing or no picture, or maps were not recorded or are not finite.
            IndexError: If there is no such sample.
            ImportError: If matplotlib is missing.
        """
        from i2am.plots.recorded import Recorded, figure

        return figure(
            which,
            [Recorded(self.select(samples=sample), generated, reference)],
            votes=votes,
            weights=weights,
            style=style,
            threshold=threshold,
            shared=shared,
            preset=preset,
            heading=heading,
        )

    # Files

    def save(self, path: str | Path) -> None:
        """Writes one ``.safetensors`` file; see :func:`i2am.attribution.save_maps`."""
        from i2am.attribution.storage import save_maps

        save_maps(self, path)

    @classmethod
    def load(cls, path: str | Path) -> "AttributionMaps":
        """Reads what :meth:`save` wrote; see :func:`i2am.attribution.load_maps`."""
        from i2am.attribution.storage import load_maps

        return load_maps(path)

    def _repr_html_(self) -> str:
        from i2am.viewer.notebook import maps_html

        return maps_html(self)

    # Inside

    def __repr__(self) -> str:
        return summary(self)

    def _read_row(
        self,
        row: str,
        per: PerAxes,
        size: Grid | None,
        source: str | None,
        preset: str | Preset,
        layer_weighting: LayerWeighting,
    ) -> Tensor:
        index = self.rows.index(row)
        preset = get_preset(preset)
        layers = received_of(self.layer_sums, source)
        refuse_gridless(layers, "generated_to_reference", preset)

        def sums(layer: LayerSums) -> Tensor:
            held = recorded(layer, Direction.GENERATED_TO_REFERENCE)[:, :, :, index, None]
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

    def _with(self, layers: Sequence[LayerSums], joint: JointMaps | None) -> "AttributionMaps":
        return type(self)(
            layers, votes=self.votes, rows=self.rows, provenance=self.provenance, joint=joint
        )
