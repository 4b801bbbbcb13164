"""Sums of all layers on one grid per direction: what stays does not grow with the layers.

Resizing is linear, so resizing what each call adds gives the same maps as adding first and resizing
when they are read. What is lost is the layer axis.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from i2am.attribution.grid import Grid, resize
from i2am.attribution.sums import AttentionSite, LayerSums
from i2am.attribution.time_groups import TimeGroups, refuse_capture

RESIZED = "resized"
"""What the one layer of such a recording is called."""


@dataclass
class ResizedSums:
    """Bilinearly resized sums of several layers, on the finest grid among them.

    Added in the order of the calls, so that equal runs give equal bits.

    Attributes:
        sites: What was added, in the order in which it was first seen.
        generated_grid: Grid of R2G.
        reference_grid: Grid of G2R; ``None`` where a layer has none, and then there is no G2R.
        r2g: ``[samples, slots, heads, votes, h, w]``, see :class:`TimeGroups`.
        share: Likewise.
        g2r: ``[samples, slots, heads, rows, h_I, w_I]``.
        heads: How many heads stay apart: those of every layer, 1 where layers differ.
        calls: ``[samples, slots]``, of all layers together.
    """

    sites: dict[str, AttentionSite]
    generated_grid: Grid
    reference_grid: Grid | None
    r2g: Tensor | None
    share: Tensor | None
    g2r: Tensor | None
    heads: int
    calls: Tensor

    @classmethod
    def like(cls, layers: Sequence[LayerSums], time_groups: int) -> "ResizedSums":
        """Zeros for sums ``[samples, 1, heads, ?, h, w]`` of layers, which are not added yet."""
        sites = {layer.site.layer: layer.site for layer in layers}
        counts = {site.heads for site in sites.values()}
        heads = counts.pop() if len(counts) == 1 else 1
        generated = max((site.generated_grid for site in sites.values()), key=math.prod)
        places = [site.reference_grid for site in sites.values()]
        known = [place for place in places if place is not None]
        reference = max(known, key=math.prod) if len(known) == len(places) else None

        def zeros(sums: Tensor | None, grid: Grid | None) -> Tensor | None:
            if sums is None or grid is None:
                return None
            refuse_capture(sums)
            # tensors born in inference mode could not be updated outside of it later
            with torch.inference_mode(False):
                kept = sums.shape[3:-2]
                return sums.new_zeros((len(sums), time_groups, heads, *kept, *grid))

        first = layers[0]
        assert first.calls is not None
        with torch.inference_mode(False):
            calls = first.calls.new_zeros((len(first.calls), time_groups))
        return cls(
            sites,
            generated,
            reference,
            zeros(first.reference_to_generated, generated),
            zeros(first.attention_share, generated),
            zeros(first.generated_to_reference, reference),
            heads,
            calls,
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All sums, as far as there are any."""
        sums = (self.r2g, self.share, self.g2r, self.calls)
        return [each for each in sums if each is not None]

    def add(self, layer: LayerSums) -> None:
        """Add sums ``[samples, 1, heads, ?, h, w]`` of a layer to the current time group.

        Raises:
            ValueError: The layer is new, and has another number of heads, where heads stay apart,
                or no reference grid.
        """
        site = layer.site
        if site.layer not in self.sites:
            self.sites[site.layer] = site
            if self.heads not in (1, site.heads):
                raise ValueError(
                    f"sums='resized' needs layers of {self.heads} heads, as in the first "
                    f"evaluation, and {site.layer}, which came later, has {site.heads}"
                )
            if site.reference_grid is None and self.g2r is not None:
                raise ValueError(
                    f"sums='resized' needs a reference grid of every layer or of none from the "
                    f"first evaluation on, and {site.layer}, which came later, has none"
                )
        if self.r2g is not None and layer.reference_to_generated is not None:
            self.r2g[:, 0] += self._resized(layer.reference_to_generated, self.generated_grid)
        if self.share is not None and layer.attention_share is not None:
            self.share[:, 0] += self._resized(layer.attention_share, self.generated_grid)
        if layer.calls is not None:
            self.calls[:, 0] += layer.calls[:, 0]
        if self.g2r is not None and layer.generated_to_reference is not None:
            assert self.reference_grid is not None
            self.g2r[:, 0] += self._resized(layer.generated_to_reference, self.reference_grid)

    def _resized(self, sums: Tensor, grid: Grid) -> Tensor:
        sums = sums[:, 0]
        if self.heads == 1 < sums.shape[1]:
            sums = sums.mean(1, keepdim=True)
        return resize(sums, grid)

    def mean(self, groups: TimeGroups) -> LayerSums:
        """The mean over the layers, as one layer whose site says which they are."""
        sites = list(self.sites.values())
        grid = self.reference_grid
        site = replace(
            sites[0],
            layer=RESIZED,
            heads=self.heads,
            generated_grid=self.generated_grid,
            reference_grid=grid,
            reference_tokens=max(site.reference_tokens for site in sites),
            causal=all(site.causal for site in sites),
            merged=tuple(self.sites),
        )
        if grid is not None:
            site = replace(site, reference_tokens=math.prod(grid))
        r2g, share, g2r, calls = (
            sums if sums is None else groups.ordered(sums) / len(sites)
            for sums in (self.r2g, self.share, self.g2r, self.calls)
        )
        return LayerSums(site, r2g, g2r, attention_share=share, calls=calls)
