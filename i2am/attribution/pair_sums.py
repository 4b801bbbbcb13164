"""Sums of pair maps: call by call, pooled to at most about a thousand cells per image.

A call is pooled to the grids of its own layer, each halved until it is coarse enough, and layers of
equal grids share their sums. What stays is therefore a pyramid, at most a third more than its
finest level, whatever the number of layers; it is resized once, when the maps are read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from i2am.attribution.grid import Grid, ResizeMode, area_weights, resize
from i2am.attribution.pairs import PairMaps
from i2am.attribution.sums import AttentionSite
from i2am.attribution.time_groups import TimeGroups, refuse_capture
from i2am.kernels import Over, Pooling, Probe

CELLS = 1024
"""Most cells of a grid that is not asked for by its size: 32 x 32, or 32 x 24."""

PairGrids = bool | Grid | tuple[Grid, Grid]
"""``pairs=``: False, True for grids of at most :data:`CELLS` cells, the generated grid ``(height,
width)``, or the generated and the reference grid."""


@dataclass
class _Level:
    """The sums of all layers of one pair of grids."""

    mean: tuple[Tensor, Tensor]
    """G2R and R2G ``[B, slots, cells, reference cells]``, averaged over heads."""
    heads: tuple[Tensor, Tensor] | None = None
    """G2R and R2G ``[B, H, cells, reference cells]``, summed over time."""


class PairSums:
    """Adds up what :class:`PairMaps` will show.

    Args:
        generated_grid: Grid of the result over the generated image; ``None`` for the finest of the
            layers', each halved until it has at most :data:`CELLS` cells.
        reference_grid: Likewise over the reference image.
        time_groups: Number of groups; calls are added to the current one, see :class:`TimeGroups`.
    """

    def __init__(
        self, generated_grid: Grid | None, reference_grid: Grid | None, time_groups: int
    ) -> None:
        self._grids = (generated_grid, reference_grid)
        self._time_groups = time_groups
        self._levels: dict[tuple[Grid, Grid], _Level] = {}
        self._layers: dict[str, int] = {}
        self._source: str | None = None
        self._poolings: dict[tuple[Grid, Grid, torch.device], Pooling] = {}

    @property
    def tensors(self) -> list[Tensor]:
        """All sums that are kept by time group."""
        return [sums for level in self._levels.values() for sums in level.mean]

    def probes(self, site: AttentionSite, query: Tensor) -> list[Probe]:
        """What adds one call up; nothing for a layer without a reference grid.

        Args:
            site: The layer; the keys of the call are its reference tokens.
            query: ``[batch, heads, seqlen_q, head_dim]``: the tokens of the generated grid.

        Raises:
            ValueError: Another reference was added up before.
        """
        if site.reference_grid is None:
            return []
        if self._source not in (None, site.source):
            raise ValueError(
                f"pairs must be left out where there are several references, got {self._source} "
                f"and {site.source}"
            )
        self._source = site.source
        self._layers[site.layer] = site.heads
        grids = (
            _pooled(site.generated_grid, self._grids[0]),
            _pooled(site.reference_grid, self._grids[1]),
        )
        cells = (math.prod(grids[0]), math.prod(grids[1]))
        # tensors born in inference mode could not be updated outside of it later
        with torch.inference_mode(False):
            # where reference cells are pooled, maps of a call come reference first in memory
            turned = grids[1] != site.reference_grid
            level = self._levels.get(grids)
            if level is None:
                shape = (len(query), self._time_groups, *cells)
                level = self._levels[grids] = _Level(_zeros(query, *shape, turned=turned))
            if not self._heads:
                # nobody could read them: kept neither here nor where they began
                for each in self._levels.values():
                    each.heads = None
            elif level.heads is None:
                level.heads = _zeros(query, *query.shape[:2], *cells, turned=turned)
        left = self._pooling(site.generated_grid, grids[0], query.device)
        right = self._pooling(site.reference_grid, grids[1], query.device)
        probes = []
        for over, mean, heads in zip(
            (Over.KEYS, Over.QUERIES), level.mean, level.heads or (None, None), strict=True
        ):
            probes.append(Probe(over, mean[:, 0], left, right))
            if heads is not None:
                probes.append(Probe(over, heads, left, right))
        return probes

    def resolve(self, rows: slice) -> "PairSums":
        """Copies of some rows of the batch."""
        resolved = PairSums(*self._grids, self._time_groups)
        resolved._layers, resolved._source = dict(self._layers), self._source
        resolved._poolings = self._poolings
        for grids, level in self._levels.items():
            resolved._levels[grids] = _Level(
                _rows(level.mean, rows),
                None if level.heads is None else _rows(level.heads, rows),
            )
        return resolved

    def maps(self, groups: TimeGroups) -> PairMaps | None:
        """The mean over the layers on the pair grids, as a copy; ``None`` if none took part."""
        if not self._levels:
            return None
        generated = self._grids[0] or max((grids[0] for grids in self._levels), key=math.prod)
        reference = self._grids[1] or max((grids[1] for grids in self._levels), key=math.prod)
        some = next(iter(self._levels.values())).mean[0]
        shape = (
            len(some),
            len(groups) + self._heads,
            math.prod(generated),
            math.prod(reference),
        )
        with torch.inference_mode(False):
            g2r, r2g = some.new_zeros(shape), some.new_zeros(shape)
            for (rows, columns), level in self._levels.items():
                slices = [tuple(sums[:, slot] for sums in level.mean) for slot in groups.slots]
                slices += zip(*(sums.unbind(1) for sums in level.heads or ()), strict=True)
                for place, sums in enumerate(slices):
                    # a map is resized as maps are; the cell that it is of, as a region or mask is
                    moved = _resized(sums[0], columns, reference, "bilinear")
                    g2r[:, place] += _resized(moved.mT, rows, generated, "area").mT
                    moved = _resized(sums[1], columns, reference, "area")
                    r2g[:, place] += _resized(moved.mT, rows, generated, "bilinear").mT
            g2r /= len(self._layers)
            r2g /= len(self._layers)
        layers = tuple(self._layers)
        return PairMaps(generated, reference, len(groups), self._heads, layers, g2r, r2g)

    @property
    def _heads(self) -> int:
        """The number of heads, 0 where layers differ."""
        heads = set(self._layers.values())
        return heads.pop() if len(heads) == 1 else 0

    def _pooling(self, grid: Grid, target: Grid, device: torch.device) -> Pooling | None:
        if grid == target:
            return None
        if (grid, target, device) not in self._poolings:
            self._poolings[grid, target, device] = pooling(grid, target).to(device)
        return self._poolings[grid, target, device]


def as_pairs(pairs: PairGrids, time_groups: int) -> PairSums | None:
    """What ``pairs=`` asks for.

    Raises:
        ValueError: It is not a bool, a grid or two.
    """
    if pairs is False or pairs is None:
        return None
    if pairs is True:
        return PairSums(None, None, time_groups)
    if (grid := _grid(pairs)) is not None:
        return PairSums(grid, None, time_groups)
    if isinstance(pairs, Sequence) and len(pairs) == 2:
        generated, reference = map(_grid, pairs)
        if generated is not None and reference is not None:
            return PairSums(generated, reference, time_groups)
    raise ValueError(
        "pairs must be True, a generated grid (height, width) of whole numbers >= 1, or a "
        f"generated and a reference grid, got {pairs!r}"
    )


def pooling(grid: Grid, target: Grid) -> Pooling:
    """Every cell of ``target`` as the mean of the part of ``grid`` that it covers."""
    down = area_weights(grid[0], target[0])
    across = area_weights(grid[1], target[1])
    bands = []
    for weights in down:
        covered = weights.nonzero()[:, 0]
        top, bottom = int(covered[0]), int(covered[-1]) + 1
        band = weights[top:bottom, None] * across[:, None]  # [cells, rows, columns]
        bands.append((top * grid[1], band.flatten(1)))
    return Pooling.of(bands, math.prod(grid))


def _pooled(grid: Grid, asked: Grid | None) -> Grid:
    """The grid on which a layer's sums are kept."""
    if asked is not None:
        return asked if math.prod(asked) < math.prod(grid) else grid
    while math.prod(grid) > CELLS:
        grid = (-(-grid[0] // 2), -(-grid[1] // 2))
    return grid


def _resized(sums: Tensor, grid: Grid, target: Grid, mode: ResizeMode) -> Tensor:
    """The last axis, cells of a grid, as those of another."""
    if grid == target:
        return sums
    return resize(sums.unflatten(-1, grid), target, mode=mode).flatten(-2)


def _rows(sums: tuple[Tensor, Tensor], rows: slice) -> tuple[Tensor, Tensor]:
    return sums[0][rows].clone(), sums[1][rows].clone()


def _zeros(like: Tensor, *shape: int, turned: bool) -> tuple[Tensor, Tensor]:
    if turned:
        *leading, rows, columns = shape
        g2r, r2g = _zeros(like, *leading, columns, rows, turned=False)
        return g2r.mT, r2g.mT
    refuse_capture(like)
    statistics = torch.promote_types(like.dtype, torch.float32)
    return like.new_zeros(shape, dtype=statistics), like.new_zeros(shape, dtype=statistics)


def _grid(value: object) -> Grid | None:
    """A grid that a caller gave, if it is one."""
    if not isinstance(value, Sequence) or len(value) != 2:
        return None
    height, width = value
    whole = all(isinstance(side, int) and not isinstance(side, bool) for side in (height, width))
    return (height, width) if whole and height > 0 and width > 0 else None
