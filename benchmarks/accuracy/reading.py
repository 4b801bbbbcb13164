"""What one recorded batch says: where the maps of its query cells point, and its mask scores."""

from collections import defaultdict

import torch
from accuracy.places import GRID, Places
from torch import Tensor

from i2am.attribution import AttributionMaps, Patch, mask_weights
from i2am.data.paper_doll import Scenes
from i2am.metrics import centroid, imacs_scores, peak

POSITIONS = {"peak": peak, "centroid": centroid}
ALL = "all"


def patch(cell: int) -> Patch:
    """The query cell of an index in reading order."""
    return Patch(*divmod(cell, GRID[1]), GRID)


def view_names(maps: AttributionMaps) -> list[str]:
    """Names of what `views` returns, in its order."""
    heads = range(maps.layer_sums[0].site.heads)
    return [
        ALL,
        *(f"layer {layer}" for layer in maps.layers),
        *(f"head {head}" for head in heads),
        *(f"time group {group}" for group in range(maps.time_groups)),
        *(f"layer {layer} head {head}" for layer in maps.layers for head in heads),
    ]


def views(kept: Tensor) -> Tensor:
    """A map read with all axes kept, reduced in every way that is scored; see `view_names`.

    Args:
        kept: ``[samples, time, layer, head, height, width]``.

    Returns:
        ``[views, samples, height, width]``: sums over time, means over layers and heads.
    """
    sums = kept.sum(1)
    return torch.cat(
        [
            sums.mean((1, 2))[None],
            sums.mean(2).movedim(1, 0),
            sums.mean(1).movedim(1, 0),
            kept.mean((2, 3)).movedim(1, 0),
            sums.flatten(1, 2).movedim(1, 0),
        ]
    )


def read_positions(maps: AttributionMaps, places: Places) -> dict[str, Tensor]:
    """Where the specific-reference map of every query cell points, in every view.

    Returns:
        Positions fp32 ``[views, n, 2]`` by the name of how a position is taken.
    """
    found = {name: torch.empty(len(view_names(maps)), len(places.cell), 2) for name in POSITIONS}
    # a region is read for all samples at once, so cell by cell and not scene by scene
    for cell in places.cell.unique().tolist():
        asked = (places.cell == cell).nonzero()[:, 0]
        read = maps.specific_reference(patch(cell), per=("time", "layer", "head"))
        maps_of_cell = views(read[places.scene[asked]])
        for name, position in POSITIONS.items():
            found[name][:, asked] = position(maps_of_cell)
    return found


def read_scores(maps: AttributionMaps, scenes: Scenes) -> dict[str, Tensor]:
    """IMACS and shares of mass inside the masks, of all layers together and of each.

    Returns:
        fp64 ``[samples]`` by ``"view/score"``, NaN where a sample has no score.
    """
    scores = {}
    for view in (ALL, *maps.layers):
        part = maps if view == ALL else maps.select(layers=view)
        imacs = imacs_scores(
            part, mask=scenes.mask, reference_mask=scenes.garment_mask, undefined="nan"
        )
        found: dict[str, Tensor] = {name: score.values for name, score in imacs.items()}
        for votes in ("uniform", "mask"):
            r2g = part.reference_to_generated(votes=votes)
            found[f"r2g_share_{votes}_votes"] = share_inside(r2g, scenes.mask)
        g2r = part.generated_to_reference(weights="mask")
        found["g2r_share_on_garment"] = share_inside(g2r, scenes.garment_mask)
        scores |= {f"{view}/{name}": values for name, values in found.items()}
    return scores


def share_inside(maps: Tensor, mask: Tensor) -> Tensor:
    """fp64 ``[samples]``: the share of a map's mass that lies in a mask, cells in proportion."""
    inside = mask_weights(mask, (maps.shape[-2], maps.shape[-1])).double()
    mass = maps.double().flatten(1)
    return (mass * inside).sum(1) / mass.sum(1)


def join(batches: list[dict[str, Tensor]], dim: int = 0) -> dict[str, Tensor]:
    """The same tensors of several batches in one."""
    lists = defaultdict(list)
    for batch in batches:
        for name, values in batch.items():
            lists[name].append(values)
    return {name: torch.cat(values, dim) for name, values in lists.items()}


def means(values: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Means over the scenes that have a score, by the two parts of ``"of/score"``."""
    nested: dict[str, dict[str, float]] = {}
    for name, of in values.items():
        outer, _, inner = name.partition("/")
        nested.setdefault(outer, {})[inner] = float(of.nanmean())
    return nested


def standard_error(values: Tensor) -> float:
    """Of a mean over scenes that have a score."""
    values = values[~values.isnan()].double()
    return float(values.std() / len(values) ** 0.5)
