"""``PairMaps``: every patch of one image against every patch of the other, read after the run.

A :class:`~i2am.attribution.AttributionMaps` keeps what was declared before the run. Pair maps keep
all pairs of cells of two coarse grids instead, heads and layers averaged, so that any patch can be
clicked afterwards for megabytes.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from i2am.attribution.grid import Grid, Patch, resize
from i2am.attribution.presets import Preset
from i2am.wording import counted


@dataclass(frozen=True, eq=False, repr=False)
class PairMaps:
    """Both directions between all cells of a generated and a reference grid.

    Values are those of :meth:`AttributionMaps.specific_reference` of one cell, and of
    :meth:`AttributionMaps.reference_to_generated` with the votes of one cell: sums over the
    evaluations, averaged over layers (and over heads, where these are not asked for).

    Args:
        generated_grid: ``(height, width)`` of the cells over the generated image.
        reference_grid: ``(height, width)`` of the cells over the reference image.
        time_groups: Number of time groups; slice ``t`` of the tensors is group ``t``, heads
            averaged.
        heads: Number of heads; slice ``time_groups + h`` is head ``h``, summed over time. 0 where
            the layers differ in how many they have: then there are no such slices.
        layers: The layers averaged, those with a reference grid.
        g2r: fp32 ``[samples, time_groups + heads, generated cells, reference cells]``, cells
            row-major: for every generated cell, where on the reference it looks.
        r2g: fp32, likewise (generated cells first here too): for every reference cell, where on the
            generated image it goes.

    Raises:
        ValueError: A tensor's shape contradicts the grids, time groups and heads.
    """

    generated_grid: Grid
    reference_grid: Grid
    time_groups: int
    heads: int
    layers: tuple[str, ...]
    g2r: Tensor
    r2g: Tensor

    def __post_init__(self) -> None:
        slices = self.time_groups + self.heads
        cells = [math.prod(self.generated_grid), math.prod(self.reference_grid)]
        for name, sums in (("g2r", self.g2r), ("r2g", self.r2g)):
            wanted = [len(self.g2r), slices, *cells]
            if list(sums.shape) != wanted:
                raise ValueError(f"{name} must be {wanted}, got {list(sums.shape)}")

    @property
    def n_samples(self) -> int:
        """Number of generated images."""
        return len(self.g2r)

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.g2r.nbytes + self.r2g.nbytes

    def generated_to_reference(self, time: int | None = None, head: int | None = None) -> Tensor:
        """Where on the reference each generated cell looks (G2R, eq 16).

        Args:
            time: A time group, heads averaged; default the sum over all.
            head: A head, summed over time; default the mean over all.

        Returns:
            fp32 ``[samples, generated height, generated width, reference height, reference
            width]``, not normalized.

        Raises:
            ValueError: Both are given, or heads were not kept apart.
            IndexError: There is no such time group or head.
        """
        sums = self._slice(self.g2r, time, head)
        return sums.unflatten(2, self.reference_grid).unflatten(1, self.generated_grid)

    def reference_to_generated(self, time: int | None = None, head: int | None = None) -> Tensor:
        """Where on the generated image each reference cell goes (R2G, votes of that cell alone).

        Args:
            time: As in :meth:`generated_to_reference`.
            head: As in :meth:`generated_to_reference`.

        Returns:
            fp32 ``[samples, reference height, reference width, generated height, generated
            width]``, not normalized.

        Raises:
            ValueError: Both are given, or heads were not kept apart.
            IndexError: There is no such time group or head.
        """
        sums = self._slice(self.r2g, time, head).mT
        return sums.unflatten(2, self.generated_grid).unflatten(1, self.reference_grid)

    def nonfinite(self) -> list[str]:
        """Where values are NaN or infinite: one line per direction, empty if all is well."""
        sums = {"generated_to_reference": self.g2r, "reference_to_generated": self.r2g}
        broken = [name for name, of in sums.items() if not bool(of.isfinite().all())]
        return [f"{name} of the pair maps" for name in broken]

    def cell(self, region: object) -> int | None:
        """The number of the generated cell that a region is, ``None`` if it is none."""
        if not isinstance(region, Patch) or tuple(region.grid) != self.generated_grid:
            return None
        return region.row * region.grid[1] + region.column

    def read_cell(
        self,
        cell: int,
        per: frozenset[str],
        *,
        size: Grid,
        preset: Preset,
        layer_weighting: str,
        tags: Collection[str],
    ) -> Tensor:
        """What :meth:`AttributionMaps.specific_reference` says of a generated cell.

        Args:
            cell: Its number.
            per: Axes to keep, one of time and head at most.
            size: Grid of the result.
            preset: One of bilinear maps of all layers.
            layer_weighting: ``"paper"``.
            tags: Those of all layers.

        Returns:
            fp32 ``[samples, (time), (head), *size]``.

        Raises:
            ValueError: Pair maps cannot be read so.
        """
        for what, refused in {
            f"per={', '.join(sorted(per))}": len(per) > 1 or "layer" in per,
            "per=head of layers with different numbers of heads": "head" in per and not self.heads,
            f"preset {preset.name!r}": preset.clamp_after_grid_resize
            or preset.grid_resize != "bilinear"
            or not preset.counts(tags),
            f"layer_weighting={layer_weighting!r}": layer_weighting != "paper",
        }.items():
            if refused:
                raise ValueError(
                    f"a patch that was not declared is read from pair maps, which are averaged "
                    f"over layers and over heads or time, and cannot be read with {what}; declare "
                    "it before the run with record(regions=...)"
                )
        sums = self.g2r[:, :, cell].unflatten(-1, self.reference_grid)
        if "time" in per:
            sums = sums[:, : self.time_groups]
        elif "head" in per:
            sums = sums[:, self.time_groups :]
        else:
            sums = sums[:, : self.time_groups].sum(1)
        return resize(sums, size)

    def apply(self, function: Callable[[Tensor], Tensor]) -> "PairMaps":
        """The same with `function` applied to both tensors."""
        return replace(self, g2r=function(self.g2r), r2g=function(self.r2g))

    def of_groups(self, groups: Sequence[int]) -> "PairMaps":
        """The same with some time groups alone, in that order."""
        if list(groups) == list(range(self.time_groups)):
            return self
        kept = [*groups, *range(self.time_groups, self.time_groups + self.heads)]
        return replace(self, time_groups=len(groups), g2r=self.g2r[:, kept], r2g=self.r2g[:, kept])

    @property
    def extent(self) -> str:
        """What there is, for people: ``"32x24 generated by 19x14 reference cells, ..."``."""
        rows, columns = self.generated_grid, self.reference_grid
        return (
            f"{rows[0]}x{rows[1]} generated by {columns[0]}x{columns[1]} reference cells, "
            f"{counted(self.time_groups, 'time group')}, "
            f"{self.heads or 'no'} heads"
        )

    def __repr__(self) -> str:
        return (
            f"PairMaps: {self.extent}, {counted(self.n_samples, 'sample')}, mean of "
            f"{counted(len(self.layers), 'layer')}, {self.nbytes / 2**20:.1f} MiB"
        )

    def _slice(self, sums: Tensor, time: int | None, head: int | None) -> Tensor:
        """``[samples, generated cells, reference cells]``"""
        if time is not None and head is not None:
            raise ValueError(
                f"time and head must not both be given, got time={time} and head={head}: pair "
                "maps keep time groups averaged over heads, and heads summed over time"
            )
        if time is not None:
            return sums[:, _index("time", time, self.time_groups)]
        if head is None:
            return sums[:, : self.time_groups].sum(1)
        if not self.heads:
            raise ValueError(
                f"head must be None, got {head}: the layers have different numbers of heads, so "
                "pair maps could not keep them apart"
            )
        return sums[:, self.time_groups + _index("head", head, self.heads)]


def concatenate_pairs(parts: Sequence[PairMaps]) -> PairMaps | None:
    """Joins pair maps that agree in everything but the number of samples; ``None`` for none."""
    if not parts:
        return None
    return replace(
        parts[0],
        g2r=torch.cat([part.g2r for part in parts]),
        r2g=torch.cat([part.r2g for part in parts]),
    )


def _index(name: str, index: int, size: int) -> int:
    if not -size <= index < size:
        raise IndexError(f"{name} must be one of {size}, 0 to {size - 1}, got {index}")
    return index % size
