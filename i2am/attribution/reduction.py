"""Reduces per-layer sums to one map tensor: which axes stay, which are averaged, on which grid."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from i2am.attribution.grid import Box, Grid, Patch, resize
from i2am.attribution.layers import evened, without_grid
from i2am.attribution.presets import Preset
from i2am.attribution.sums import LayerSums

Axis = Literal["time", "layer", "head", "frame"]
LayerWeighting = Literal["paper", "area"]

AXES: tuple[Axis, ...] = ("time", "layer", "head", "frame")


def kept_axes(per: str | Iterable[str]) -> frozenset[str]:
    """The axes named by `per`.

    Raises:
        ValueError: If a name is not "time", "layer", "head" or "frame".
    """
    names = frozenset([per] if isinstance(per, str) else per)
    unknown = sorted(names.difference(AXES))
    if unknown:
        raise ValueError(
            f"per must name some of time, layer, head, frame, got {', '.join(unknown)}"
        )
    return names


def layers_of(layers: Sequence[LayerSums], preset: Preset) -> list[LayerSums]:
    """The layers that count under a preset, in order.

    Raises:
        ValueError: If none does.
    """
    counted = [layer for layer in layers if layer.site.merged or preset.counts(layer.site.tags)]
    if not counted:
        raise ValueError(
            f"preset {preset.name!r} leaves out every layer here: "
            f"{', '.join(layer.site.layer for layer in layers)}"
        )
    return counted


def check_resized(
    layers: Iterable[LayerSums],
    *,
    per: frozenset[str],
    preset: Preset,
    layer_weighting: LayerWeighting,
) -> None:
    """Refuses readings that need the layers apart, where they were added up while recording.

    Raises:
        ValueError: If `layers` hold resized sums, and layers are kept, weighted by area, resized
            other than bilinearly or left out.
    """
    merged = [layer.site for layer in layers if layer.site.merged]
    leaves_out = not all(preset.counts(site.tags) for site in merged)
    resizes = preset.clamp_after_grid_resize or preset.grid_resize != "bilinear"
    for what, refused in {
        "per='layer'": "layer" in per,
        "layer_weighting='area'": layer_weighting == "area",
        f"preset {preset.name!r}": resizes or leaves_out,
    }.items():
        if merged and refused:
            raise ValueError(
                f"{what} needs the layers apart, record(sums='native'); these maps were recorded "
                "with sums='resized'"
            )


def refuse_gridless(layers: Sequence[LayerSums], what: str, preset: Preset) -> None:
    """Refuses readings that need every layer's reference tokens to have a place.

    Raises:
        ValueError: If those of a layer have none.
    """
    if gridless := without_grid(layers_of(layers, preset)):
        raise ValueError(
            f"{what} does not exist for layers without a reference grid (a single reference "
            f"token, say): {', '.join(gridless)}; choose others with select(layers=...)"
        )


def refuse_mean_heads(layers: Sequence[LayerSums]) -> None:
    """Refuses the spread per head where its mean over heads was kept alone.

    Raises:
        ValueError: If it was, of a layer.
    """
    if any(layer.site.spread_over_heads for layer in layers):
        raise ValueError(
            "per='head' of measure='spread' needs heads apart, record(sums='native'); these maps "
            "were recorded with sums='resized', which keeps the mean over heads of a spread that "
            "is not read by default"
        )


def read(
    layers: Sequence[LayerSums],
    sums: Callable[[LayerSums], Tensor],
    per: str | Iterable[str],
    size: Grid | None,
    preset: Preset,
    layer_weighting: LayerWeighting,
) -> Tensor:
    """What :func:`reduce_layers` makes of the layers that count under a preset.

    Args:
        layers: Layers of one source.
        sums: Which of their sums are read.
        per: Axes to keep.
        size: Grid of the result.
        preset: Which layers count, and how they are resized.
        layer_weighting: As in :func:`reduce_layers`.

    Raises:
        ValueError: If an argument is unknown, or the layers cannot be read so.
    """
    kept = kept_axes(per)
    check_resized(layers, per=kept, preset=preset, layer_weighting=layer_weighting)
    return reduce_layers(
        [sums(layer) for layer in evened(layers_of(layers, preset))],
        per=kept,
        size=size,
        preset=preset,
        layer_weighting=layer_weighting,
    )


def find_region(
    region: str | Patch | Box, names: Sequence[str], descriptions: Mapping[str, str]
) -> str | None:
    """The name under which a region was recorded, ``None`` if it was not.

    Args:
        region: Its name, or the region itself.
        names: The recorded ones.
        descriptions: What :func:`describe_regions` says of some of them; a name without an entry
            describes itself.
    """
    text = str(region)
    described = {name: descriptions.get(name, name) for name in names}
    # a name wins, but a Patch is not what is recorded where its text names another region
    if text in described and (isinstance(region, str) or described[text] == text):
        return text
    return next((name for name, description in described.items() if description == text), None)


def undeclared(
    region: str | Patch | Box,
    names: Sequence[str],
    descriptions: Mapping[str, str],
    pair_grid: Grid | None,
) -> ValueError:
    """What to raise for a region that was not recorded; see :func:`find_region`.

    Args:
        region: What was asked for.
        names: The recorded ones.
        descriptions: What some of them stand for.
        pair_grid: Grid whose patches are known without a declaration, if there is one.
    """
    known = ", ".join(
        name if descriptions.get(name, name) == name else f"{name} ({descriptions[name]})"
        for name in names
    )
    pairs = ""
    if pair_grid is not None:
        pairs = f" or be a Patch of the pair grid {pair_grid[0]}x{pair_grid[1]}"
    return ValueError(
        f"region must be declared before the run with record(regions=...){pairs}; "
        f"declared: {known or 'none'}; got {region}"
    )


def missing_for_official(
    layers: Sequence[LayerSums], provenance: Mapping[str, Any], size: Grid | None
) -> list[str]:
    """What a recording lacks for R2G to repeat the published result exactly; empty if nothing.

    A single reference token needs nothing, and keys need not be apart where no map is resized.
    """
    several = [layer for layer in layers if layer.site.reference_tokens > 1]
    grids = {layer.site.generated_grid for layer in layers}
    if size is not None:
        grids.add((size[0], size[1]))
    missing = []
    if len(grids) > 1 and any(layer.reference_to_generated_by_key is None for layer in several):
        missing.append("R2G per key, record(keep_keys=True)")
    if several and provenance.get("prefix_votes") is False:
        missing.append("the votes of prefix tokens, a layout with prefix_votes=True")
    return missing


def reduce_layers(
    sums: Sequence[Tensor],
    *,
    per: frozenset[str],
    size: Grid | None,
    preset: Preset,
    layer_weighting: LayerWeighting = "paper",
) -> Tensor:
    """Sums over time, resizes, and averages over frames or keys, heads and layers, keeping the axes
    in `per`.

    Args:
        sums: One fp32 ``[samples, time groups, heads, frames or keys, height, width]`` per layer:
            the frames of a video, or the keys where they were kept apart.
        per: Axes to keep.
        size: Grid of the result, by default the largest of the layers'.
        preset: Says how to resize.
        layer_weighting: ``"area"`` multiplies each layer by its number of cells.

    Returns:
        fp32 ``[samples, (time), (layer), (head), (frame), *size]``.

    Raises:
        ValueError: If heads or frames are kept and the layers differ in how many they have, or
            `layer_weighting` is unknown.
    """
    if layer_weighting not in ("paper", "area"):
        raise ValueError(f"layer_weighting must be 'paper' or 'area', got {layer_weighting!r}")
    head_counts = sorted({layer.shape[2] for layer in sums})
    if "head" in per and len(head_counts) > 1:
        raise ValueError(
            f"per='head' needs layers with one head count, got {_words(head_counts)}; "
            "read per='layer', or choose layers with select(layers=...)"
        )
    frames = sorted({layer.shape[3] for layer in sums})
    if "frame" in per and len(frames) > 1:
        raise ValueError(
            f"per='frame' needs layers with one number of frames, got {_words(frames)}; "
            "choose layers with select(layers=...)"
        )
    if size is None:
        size = max(
            ((layer.shape[-2], layer.shape[-1]) for layer in sums), key=lambda g: g[0] * g[1]
        )

    # nonlinear resizing needs the heads apart, and keeping them apart until the end as well repeats
    # the published order of fp32 additions
    apart = "head" in per or (preset.clamp_after_grid_resize and len(head_counts) == 1)
    maps = []
    for layer in sums:
        height, width = layer.shape[-2:]
        if "time" not in per:
            layer = layer.sum(1, keepdim=True)
        if not preset.clamp_after_grid_resize and "head" not in per:
            layer = layer.mean(2, keepdim=True)
        if layer_weighting == "area":
            layer = layer * (height * width)
        layer = resize(layer, size, mode=preset.grid_resize)
        if preset.clamp_after_grid_resize:
            layer = layer.clamp(min=0)
        if "frame" not in per:
            # keys last in memory, as published: the order of fp32 additions is part of parity
            layer = layer.movedim(3, -1).contiguous().mean(-1).unsqueeze(3)
        maps.append(layer if apart else layer.mean(2, keepdim=True))

    # [samples, time, layer, head, frame, height, width]
    result = torch.stack(maps, dim=2)
    if averaged := [axis for axis in ("layer", "head") if axis not in per]:
        result = result.mean([AXES.index(axis) + 1 for axis in averaged], keepdim=True)
    return result.squeeze([i for i, axis in enumerate(AXES, start=1) if axis not in per])


def _words(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"
