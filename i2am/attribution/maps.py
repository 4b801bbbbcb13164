"""``AttributionMaps``: what a run recorded, and every way of reading it."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from i2am.attribution.direction import Direction
from i2am.attribution.layers import (
    apply,
    check_layers,
    nonfinite,
    tensors,
)
from i2am.attribution.merging import check_mergeable, concatenate, merge_provenance
from i2am.attribution.pairs import PairMaps, concatenate_pairs
from i2am.attribution.presets import Preset
from i2am.attribution.readings import Readings
from i2am.attribution.shown import share_votes
from i2am.attribution.sources import of_source, sources
from i2am.attribution.summary import summary
from i2am.attribution.sums import LayerSums, Measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PerAxes = str | Iterable[str]


class AttributionMaps(Readings):
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
        pairs: Every patch against every patch, where ``record(pairs=...)`` asked for it.

    Attributes:
        layer_sums: The raw sums, one :class:`LayerSums` per layer.
        votes, rows, provenance, pairs: As given.

    Raises:
        ValueError: If `layers` is empty or repeats a layer, or the shape of a tensor contradicts
            its site, the other layers, `votes`, `rows` or `pairs`.
    """

    def __init__(
        self,
        layers: Sequence[LayerSums],
        *,
        votes: tuple[str, ...],
        rows: tuple[str, ...],
        provenance: Mapping[str, Any],
        pairs: PairMaps | None = None,
    ) -> None:
        self.layer_sums = tuple(layers)
        self.votes = tuple(votes)
        self.rows = tuple(rows)
        self.provenance = dict(provenance)
        check_layers(self.layer_sums, self.votes, self.rows)
        any_sums = next(iter(tensors(self.layer_sums[0]).values()))
        self._n_samples, self._time_groups = any_sums.shape[:2]
        self.pairs = pairs
        if pairs is not None and (pairs.n_samples, pairs.time_groups) != any_sums.shape[:2]:
            raise ValueError(
                f"pairs must hold {self._n_samples} samples and {self._time_groups} time groups, "
                f"got {pairs.n_samples} and {pairs.time_groups}"
            )

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
    def directions(self) -> tuple[Direction, ...]:
        """Directions that at least one layer recorded."""
        return tuple(
            direction
            for direction in Direction
            if any(direction.value in tensors(layer) for layer in self.layer_sums)
        )

    @property
    def informative(self) -> bool:
        """Whether every layer's output depends on the attention its map shows.

        False where a layer has a single reference token: its softmax over keys is 1 whatever the
        queries are, so its R2G map shows logits that the model never used.
        """
        return all(layer.site.informative for layer in self.layer_sums)

    @property
    def share_of(self) -> Literal["uniform", "mask"] | None:
        """Which votes' attention share says most: that of the tokens in the reference mask; without
        one that of all reference tokens, where layers attend to others as well; None where it was
        not recorded or is 1 everywhere. Of a word where no reference was recorded."""
        return share_votes(self.layer_sums, self.votes)

    def nonfinite(self) -> list[str]:
        """Where values are NaN or infinite: one line per place, empty if all is well."""
        return nonfinite(self.layer_sums) + (self.pairs.nonfinite() if self.pairs else [])

    # Subsets, batches, devices

    def select(
        self,
        layers: str | Iterable[str] | None = None,
        samples: int | slice | Sequence[int] | None = None,
        source: str | None = None,
    ) -> "AttributionMaps":
        """The same maps for some layers, samples or one source only.

        :attr:`pairs` is an average over layers, so it does not survive a choice of them.

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
        pairs = self.pairs if layers is None else None
        if source is not None:
            chosen = of_source(chosen, source)
            pairs = pairs if chosen[0].site.role == "reference" else None
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
            pairs = pairs and pairs.apply(lambda sums: sums[wanted])
        return self._with(chosen, pairs)

    def to(self, device: torch.device | str) -> "AttributionMaps":
        """The same maps on another device."""
        layers = apply(lambda sums: sums.to(device), self.layer_sums)
        return self._with(layers, self.pairs and self.pairs.apply(lambda sums: sums.to(device)))

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
                votes, rows, recorded sums, branch, layout, the votes of prefix tokens, what a
                region's name stands for, or pair maps.
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
            pairs=concatenate_pairs([result.pairs for result in results if result.pairs]),
        )

    # Pictures

    def plot(
        self,
        which: str | int,
        *,
        generated: Any = None,
        reference: Any = None,
        sample: int = 0,
        source: str | None = None,
        votes: Literal["uniform", "mask"] = "uniform",
        measure: Measure | None = None,
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
                ``"layers"``; ``"words"``, the share of every word; or ``"frames"`` of a video.
            generated: The generated image, uint8 ``[height, width, 3]``: array, tensor or PIL
                image; of a video any of its pictures. All but figure 8 need it.
            reference: The reference image, likewise. Figures 4, 8, 9 and layers need it where the
                maps have a reference grid.
            sample: Which generated image.
            source: Which of :attr:`sources`; default the first, and the heading names it where
                there are several.
            votes, measure: As for :meth:`reference_to_generated`.
            weights: As for :meth:`generated_to_reference`.
            style: ``"default"`` or ``"paper"``.
            threshold: Normalized values up to this are left out; None keeps all.
            shared: One scale for all maps of a row, so that they can be compared.
            preset: How maps are read and drawn.
            heading: Text above the figure; by default what its maps are, where that is not simply
                the spread of the only reference of a picture.

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
            source=source,
            votes=votes,
            measure=measure,
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

    def _with(self, layers: Sequence[LayerSums], pairs: PairMaps | None) -> "AttributionMaps":
        return type(self)(
            layers, votes=self.votes, rows=self.rows, provenance=self.provenance, pairs=pairs
        )
