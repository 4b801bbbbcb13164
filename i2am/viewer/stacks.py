"""Maps of a page: of a source as a whole, and of every patch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from i2am.attribution.pairs import PairMaps
from i2am.attribution.shown import Shown
from i2am.viewer.packing import COARSE, FINE, MEDIUM


@dataclass(frozen=True)
class Stack:
    """Maps of one kind: overall ones have one query, those of pairs one per cell of `asked`.

    Attributes:
        name: "share", "r2g", "r2g_mask", "g2r", "g2r_mask", "pairs_g2r", "pairs_r2g" or "region N".
        maps: ``[slices, queries, height, width]``, raw.
        slices: "all", "t0", "h0", "l0", ... along the first axis.
        asked: Grid of the queries, None for one query.
        source: Number of the source that they are of.
    """

    name: str
    maps: Tensor
    slices: tuple[str, ...]
    asked: tuple[int, int] | None = None
    source: int = 0

    def levels(self, slice: str) -> int:
        """How finely a slice is packed."""
        if self.asked is None:
            return FINE
        return MEDIUM if slice == "all" else COARSE


def overall_stacks(shown: Shown, number: int, layers: Sequence[str]) -> Iterator[Stack]:
    """The maps of a source for everything together, then per time group, head and layer.

    Args:
        shown: The source, of one sample.
        number: Which of the page's sources it is.
        layers: Paths of all layers, in the order of their slices.
    """

    def stack(
        name: str, read: Callable[..., Tensor], axes: Sequence[str], *, placed: bool
    ) -> Stack:
        parts, slices = [read()[0, None]], ["all"]
        for axis in axes:
            parts.append(read(axis)[0])
            numbers = [*range(len(parts[-1]))]
            if axis == "layer":
                numbers = [layers.index(layer) for layer in shown.layers_of(placed=placed)]
            slices += [f"{axis[0]}{number}" for number in numbers]
        return Stack(name, torch.cat(parts)[:, None], tuple(slices), source=number)

    for way in shown.ways:
        read = partial(shown.r2g, votes=way.votes, measure=way.measure)
        yield stack(way.name, read, shown.axes(way), placed=way.votes == "mask")
    if shown.has_g2r:
        for weights in shown.weights:
            read = partial(shown.g2r, weights=weights)
            name = "g2r" if weights == "uniform" else f"g2r_{weights}"
            yield stack(name, read, shown.axes(), placed=True)
        for index, region in enumerate(shown.maps.regions):
            read = partial(shown.region, region)
            yield stack(f"region {index}", read, shown.axes(), placed=True)


def pair_stacks(pairs: PairMaps) -> list[Stack]:
    """The maps of every patch, those of one sample."""
    names = ("all", *(f"t{n}" for n in range(pairs.time_groups)))
    names += tuple(f"h{n}" for n in range(pairs.heads))
    choices: list[dict[str, int]] = [{}]
    choices += [{"time": group} for group in range(pairs.time_groups)]
    choices += [{"head": head} for head in range(pairs.heads)]
    stacks = []
    for name, read, asked in (
        ("pairs_g2r", pairs.generated_to_reference, pairs.generated_grid),
        ("pairs_r2g", pairs.reference_to_generated, pairs.reference_grid),
    ):
        # [slices, queries, height, width]
        maps = torch.stack([read(**choice)[0].flatten(0, 1) for choice in choices])
        stacks.append(Stack(name, maps, names, asked))
    return stacks
