"""Sequences of per-layer sums: what they hold, consistency, what is not finite."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from i2am.attribution.direction import Direction
from i2am.attribution.sums import AttentionSite, LayerSums

SUMS = (
    "reference_to_generated",
    "generated_to_reference",
    "reference_to_generated_by_key",
    "attention_share",
    "places",
    "attention_norm",
    "generated_to_reference_conditional",
    "calls",
)
"""Fields of :class:`LayerSums` that hold a tensor ``[samples, time groups, ...]``."""


ON_REFERENCE = ("generated_to_reference", "generated_to_reference_conditional")
"""Those of them on the reference grid."""


def tensors(layer: LayerSums) -> dict[str, Tensor]:
    """The sums a layer holds, by field name."""
    return {name: getattr(layer, name) for name in SUMS if getattr(layer, name) is not None}


def fields(layer: LayerSums) -> dict[str, Tensor]:
    """The sums that can be resized, by field name: all but those kept by key."""
    left_out = ("calls", "reference_to_generated_by_key")
    return {name: sums for name, sums in tensors(layer).items() if name not in left_out}


def layer_sums(site: AttentionSite, held: Mapping[str, Tensor]) -> LayerSums:
    """A layer that holds sums by field name."""
    return LayerSums(site, **{name: held.get(name) for name in SUMS})


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


def conditional(layer: LayerSums) -> Tensor:
    """The sums of G2R given that a patch looks at the reference.

    Raises:
        ValueError: If they were not recorded.
    """
    sums = layer.generated_to_reference_conditional
    if sums is None and layer.site.alone:
        return recorded(layer, Direction.GENERATED_TO_REFERENCE)
    if sums is None:
        raise ValueError(
            f"the conditional of generated_to_reference was not recorded on {layer.site.layer}; "
            'record it with record(normalise="conditional")'
        )
    return sums


def shares(layer: LayerSums, *, apart: bool, values: str = "one") -> Tensor:
    """Mean attention share over the recorded calls, ``[samples, time_groups or 1, heads, votes,
    (frames), h, w]``.

    Args:
        layer: One layer.
        apart: Whether time groups stay apart.
        values: What each token counts: ``"one"``, for shares in [0, 1], or ``"norm"``, the norm of
            what it brings.

    Raises:
        ValueError: If it was not recorded.
    """
    sums, calls = layer.attention_share, layer.calls
    if sums is None or calls is None:
        raise ValueError(
            f"the attention share was not recorded on {layer.site.layer}, as in files of schema 1 "
            "and 2; read measure='spread', or record reference_to_generated again"
        )
    if values == "norm":
        sums = layer.attention_norm
        if sums is None:
            raise ValueError(
                f"the norms of values were not recorded on {layer.site.layer}; record them with "
                'record(values="norm")'
            )
    sums = multiplied(sums, layer.multiplier)
    if not apart:
        sums, calls = sums.sum(1, keepdim=True), calls.sum(1, keepdim=True)
    # a group in which a cache skipped the layer has no call
    return sums / calls.clamp_min(1)[(..., *[None] * (sums.ndim - 2))]


def multiplied(sums: Tensor, multiplier: Tensor | None) -> Tensor:
    """Sums ``[samples, time_groups, ..., h, w]`` times ``[time_groups, h, w]``, or 1 for None."""
    if multiplier is None:
        return sums
    groups, height, width = multiplier.shape
    shape = (groups, *[1] * (sums.ndim - 4), height, width)
    return sums * multiplier.to(sums.device).view(shape)


def evened(layers: Sequence[LayerSums]) -> list[LayerSums]:
    """The layers as if each had been called as often as the one that was called most.

    A cache that skips a layer in some steps must not make it weigh less.
    """
    calls = [layer.calls for layer in layers]
    known = [each for each in calls if each is not None]
    if len(known) < len(calls) or all(bool((each == known[0]).all()) for each in known):
        return list(layers)
    most = torch.stack(known).amax(0)
    even = []
    for layer, each in zip(layers, known, strict=True):
        factor = most / each.clamp_min(1)
        held: dict[str, Any] = {
            name: sums * factor[(..., *[None] * (sums.ndim - 2))]
            for name, sums in tensors(layer).items()
            if name not in ("calls", "attention_share", "attention_norm")
        }
        even.append(replace(layer, **held))
    return even


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
    names = [(layer.site.layer, layer.site.source) for layer in layers]
    if not names or len(set(names)) < len(names):
        found = [f"{layer} ({source})" for layer, source in names]
        raise ValueError(f"layers must be at least one, none twice of one source, got {found}")
    for what, values in (("votes", votes), ("rows", rows)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{what} must be at least one name, none twice, got {list(values)}")
    leading = None
    for layer in layers:
        held = tensors(layer)
        if not held.keys() - {"calls"}:
            raise ValueError(f"{layer.site.layer} holds no sums in any direction")
        for name, sums in held.items():
            shape = list(sums.shape)
            if not sums.is_floating_point():
                raise ValueError(f"{name} of {layer.site.layer} must be sums, got {sums.dtype}")
            leading = leading or shape[:2]
            # the recording decides which keys it keeps apart, so their number is free
            fourth, grid = shape[3:4], layer.site.generated_shape
            if name == "calls":
                if shape != leading:
                    raise ValueError(f"calls of {layer.site.layer} must be {leading}, got {shape}")
                continue
            if name in ("reference_to_generated", "attention_share", "attention_norm"):
                fourth = [1 if layer.site.role == "text" else len(votes)]
            elif name == "places":
                fourth = [3]
            elif name in ON_REFERENCE:
                if layer.site.reference_grid is None:
                    raise ValueError(f"{layer.site.layer} has {name} sums but no reference grid")
                of_regions = name == "generated_to_reference"
                fourth = [sum(of_regions or row in ("uniform", "mask") for row in rows)]
                grid = layer.site.reference_grid
            heads = layer.site.heads
            if name == "reference_to_generated" and layer.site.spread_over_heads:
                heads = 1
            wanted = [*leading, heads, *fourth, *grid]
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
            if name == "calls":
                continue
            # [samples, time groups, heads]
            broken = (~sums.isfinite()).flatten(3).any(-1)
            if bool(broken.any()):
                sample, group, head = broken.nonzero()[0].tolist()
                lines.append(
                    f"{name} of {layer.site.layer} (first: sample {sample}, time group {group}, "
                    f"head {head})"
                )
    return lines
