"""Several results of one job, one after the other along the sample axis."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from i2am.attribution.layers import tensors
from i2am.attribution.sums import LayerSums

if TYPE_CHECKING:
    from i2am.attribution.maps import AttributionMaps


def check_mergeable(results: Sequence["AttributionMaps"]) -> None:
    """Checks that results differ in nothing but samples and provenance.

    Raises:
        ValueError: If they differ in layers, grids, heads, time groups, votes, rows, recorded sums,
            branch, layout, the votes of prefix tokens, what a region's name stands for, or pair
            maps.
    """
    for number, other in enumerate(results[1:], start=1):
        # what is counted comes first, so the two iterators cannot run out of step unnoticed
        for (what, mine), (_, theirs) in zip(_facts(results[0]), _facts(other), strict=True):
            if mine != theirs:
                raise ValueError(
                    f"results must agree in {what}: result 0 has {mine}, "
                    f"result {number} has {theirs}"
                )


def concatenate(parts: Sequence[Sequence[LayerSums]]) -> list[LayerSums]:
    """Joins layers that agree in everything but the number of samples."""
    return [
        replace(
            same_layer[0],
            **{
                name: torch.cat([getattr(layer, name) for layer in same_layer])
                for name in tensors(same_layer[0])
            },
        )
        for same_layer in zip(*parts, strict=True)
    ]


def merge_provenance(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all parts agree on, and what they do not as a list under ``"merged"``, one per part.

    Parts that are merged already are taken apart first, so the order of merging does not show.
    """
    flat: list[dict[str, Any]] = []
    for part in parts:
        common = {name: value for name, value in part.items() if name != "merged"}
        flat += [{**common, **own} for own in part.get("merged", [{}])]
    shared = {
        name: value
        for name, value in flat[0].items()
        if all(name in other and other[name] == value for other in flat)
    }
    own = [{name: part[name] for name in part if name not in shared} for part in flat]
    return {**shared, "merged": own} if any(own) else shared


def _facts(maps: "AttributionMaps") -> Iterator[tuple[str, object]]:
    yield "layers", ", ".join(maps.layers)
    yield "sources", ", ".join(maps.sources)
    yield "time groups", maps.time_groups
    yield "votes", ", ".join(maps.votes)
    yield "rows", ", ".join(maps.rows)
    for name in ("branch", "layout", "prefix_votes"):
        yield name, maps.provenance.get(name)
    descriptions = maps.provenance.get("regions") or {}
    yield "regions", ", ".join(f"{name}: {descriptions[name]}" for name in sorted(descriptions))
    yield "pair maps", "none" if maps.pairs is None else maps.pairs.extent
    yield "the layers of pair maps", "" if maps.pairs is None else ", ".join(maps.pairs.layers)
    for layer in maps.layer_sums:
        yield f"the grids, heads and tokens of {layer.site.layer}", layer.site
        yield f"the recorded sums of {layer.site.layer}", ", ".join(tensors(layer))
        yield f"the multipliers of {layer.site.layer}", _described(layer.multiplier)


def _described(multiplier: Tensor | None) -> str:
    if multiplier is None:
        return "none"
    # places count too
    digest = hashlib.sha256(multiplier.cpu().contiguous().numpy().tobytes()).hexdigest()[:8]
    return f"{multiplier.min():.3g} to {multiplier.max():.3g} ({digest})"
