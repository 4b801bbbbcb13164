"""Sequences of per-layer sums: what they hold, consistency, what is not finite."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from i2am.attribution.direction import Direction
from i2am.attribution.sums import LayerSums

SUMS = (
    "reference_to_generated",
    "generated_to_reference",
    "reference_to_generated_by_key",
)
"""Fields of :class:`LayerSums` that hold a tensor ``[samples, time groups, heads, ?, h, w]``."""


def tensors(layer: LayerSums) -> dict[str, Tensor]:
    """The sums a layer holds, by field name."""
    return {name: getattr(layer, name) for name in SUMS if getattr(layer, name) is not None}


def apply(function: Callable[[Tensor], Tensor], layers: Sequence[LayerSums]) -> list[LayerSums]:
    """The layers with `function` applied to every tensor."""

    def applied(layer: LayerSums) -> dict[str, Any]:
        return {name: function(sums) for name, sums in tensors(layer).items()}

    return [replace(layer, **applied(layer)) for layer in layers]


def recorded(layer: LayerSums, direction: Direction) -> Tensor:
    """The sums of one direction.

    Raises:
        ValueError: If the layer has none.
    """
    sums: Tensor | None = getattr(layer, direction.value)
    if sums is None:
        raise ValueError(
            f"{direction} was not recorded on {layer.site.layer}; record it with "
            f"record(directions=...)"
        )
    return sums


def without_grid(layers: Sequence[LayerSums]) -> list[str]:
    """Names of the layers whose reference tokens have no place, and so no map and no mask."""
    return [layer.site.layer for layer in layers if layer.site.reference_grid is None]


def check_layers(
    layers: Sequence[LayerSums], votes: tuple[str, ...], rows: tuple[str, ...]
) -> None:
    """Checks that layers describe one run.

    Raises:
        ValueError: If there is no layer or tensor, a name is repeated, or the shape of a tensor
            contradicts its site, the first tensor, `votes` or `rows`.
    """
    names = [layer.site.layer for layer in layers]
    for what, values in (("layers", names), ("votes", votes), ("rows", rows)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{what} must be at least one name, none twice, got {list(values)}")
    leading = None
    for layer in layers:
        held = tensors(layer)
        if not held:
            raise ValueError(f"{layer.site.layer} holds no sums in any direction")
        for name, sums in held.items():
            shape = list(sums.shape)
            leading = leading or shape[:2]
            # the recording decides which keys it keeps apart, so their number is free
            fourth, grid = shape[3:4], layer.site.generated_grid
            if name == "reference_to_generated":
                fourth = [len(votes)]
            elif name == "generated_to_reference":
                if layer.site.reference_grid is None:
                    raise ValueError(f"{layer.site.layer} has {name} sums but no reference grid")
                fourth, grid = [len(rows)], layer.site.reference_grid
            wanted = [*leading, layer.site.heads, *fourth, *grid]
            if shape != wanted:
                raise ValueError(f"{name} of {layer.site.layer} must be {wanted}, got {shape}")
        wanted = [(leading or [0, 0])[1], *layer.site.generated_grid]
        if layer.multiplier is not None and list(layer.multiplier.shape) != wanted:
            raise ValueError(
                f"multiplier of {layer.site.layer} must be {wanted}, got "
                f"{list(layer.multiplier.shape)}"
            )


def nonfinite(layers: Sequence[LayerSums]) -> list[str]:
    """Where sums are NaN or infinite: one line per layer and field, empty if all is well."""
    lines = []
    for layer in layers:
        for name, sums in tensors(layer).items():
            # [samples, time groups, heads]
            broken = (~sums.isfinite()).flatten(3).any(-1)
            if bool(broken.any()):
                sample, group, head = broken.nonzero()[0].tolist()
                lines.append(
                    f"{name} of {layer.site.layer} (first: sample {sample}, time group {group}, "
                    f"head {head})"
                )
    return lines
