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
from i2am.attribution.layers import ON_REFERENCE, conditional, fields, layer_sums
from i2am.attribution.sums import AttentionSite, LayerSums
from i2am.attribution.time_groups import TimeGroups, refuse_capture

RESIZED = "resized"
"""What the one layer of such a recording is called."""


@dataclass
class ResizedSums:
    """Bilinearly resized sums of several layers, on the finest grid among them.

    Added in the order of the calls, so that equal runs give equal bits. Heads stay apart where all
    layers have equally many; those of the spread do not where the share is the default measure.

    Attributes:
        sites: What was added, in the order in which it was first seen.
        generated_grid: Grid of R2G.
        reference_grid: Grid of G2R; ``None`` where a layer has none, and then there is no G2R.
        heads: How many heads stay apart.
        held: Sums ``[samples, slots, heads or 1, vectors, (frames), h, w]`` by the field of
            :class:`LayerSums`, see :class:`TimeGroups`.
        calls: ``[samples, slots]``, of all layers together.
    """

    sites: dict[str, AttentionSite]
    generated_grid: Grid
    reference_grid: Grid | None
    heads: int
    held: dict[str, Tensor]
    calls: Tensor

    @classmethod
    def like(cls, layers: Sequence[LayerSums], time_groups: int) -> "ResizedSums":
        """Zeros for sums ``[samples, 1, heads, ...]`` of layers, which are not added yet."""
        sites = {layer.site.layer: layer.site for layer in layers}
        counts = {site.heads for site in sites.values()}
        heads = counts.pop() if len(counts) == 1 else 1
        generated = max((site.generated_grid for site in sites.values()), key=math.prod)
        places = [site.reference_grid for site in sites.values()]
        known = [place for place in places if place is not None]
        reference = max(known, key=math.prod) if len(known) == len(places) else None
        first = layers[0]
        assert first.calls is not None
        held = {}
        # tensors born in inference mode could not be updated outside of it later
        with torch.inference_mode(False):
            # some may lack the conditional, which is their G2R
            every = {name: sums for layer in layers for name, sums in fields(layer).items()}
            for name, sums in every.items():
                grid = reference if name in ON_REFERENCE else generated
                if grid is None:
                    continue
                refuse_capture(sums)
                averaged = name == "reference_to_generated" and first.site.measure == "share"
                shape = (time_groups, 1 if averaged else heads, *sums.shape[3:-2], *grid)
                held[name] = sums.new_zeros((len(sums), *shape))
            calls = first.calls.new_zeros((len(first.calls), time_groups))
        return cls(sites, generated, reference, heads, held, calls)

    @property
    def tensors(self) -> list[Tensor]:
        """All sums."""
        return [*self.held.values(), self.calls]

    def add(self, layer: LayerSums) -> None:
        """Add sums ``[samples, 1, heads, ...]`` of a layer to the current time group.

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
            if site.reference_grid is None and "generated_to_reference" in self.held:
                raise ValueError(
                    f"sums='resized' needs a reference grid of every layer or of none from the "
                    f"first evaluation on, and {site.layer}, which came later, has none"
                )
        added = fields(layer)
        for name, held in self.held.items():
            sums = added[name] if name in added else conditional(layer)
            sums = sums[:, 0, :, : held.shape[3]]
            if held.shape[2] < sums.shape[1]:
                sums = sums.mean(1, keepdim=True)
            held[:, 0] += resize(sums, (held.shape[-2], held.shape[-1]))
        assert layer.calls is not None
        self.calls[:, 0] += layer.calls[:, 0]

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
            informative=all(site.informative for site in sites),
            alone=all(site.alone for site in sites),
            merged=tuple(self.sites),
            tags=tuple(sorted({tag for each in sites for tag in each.tags})),
        )
        if grid is not None:
            site = replace(site, reference_tokens=math.prod(grid))
        means = {name: groups.ordered(sums) / len(sites) for name, sums in self.held.items()}
        means["calls"] = groups.ordered(self.calls) / len(sites)
        return layer_sums(site, means)
