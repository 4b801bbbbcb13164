"""IMACS, the inpainting-mask attribution consistency score (eq 18), as pure functions."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from i2am.attribution.direction import Direction
from i2am.attribution.layers import nonfinite
from i2am.attribution.maps import AttributionMaps
from i2am.attribution.pictures import Which, seen
from i2am.attribution.postprocess import is_constant, mask_product, picture
from i2am.attribution.presets import Preset, get_preset
from i2am.attribution.reduction import LayerWeighting, layers_of
from i2am.attribution.shown import Shown
from i2am.attribution.sources import sources
from i2am.data.arrays import ImageInput, mask_batch
from i2am.data.shapes import cut_mask, require_grid, require_shape
from i2am.metrics.names import IMACS_NAMES

Undefined = Literal["raise", "nan"]
_STRETCH = "; stretch=True accepts it, for models that squeeze their pictures"


class Score(NamedTuple):
    """One score of a result, or why there is none."""

    values: Tensor | None
    """fp64 ``[samples]`` on the CPU, NaN where a sample has no score."""
    reason: str | None
    """One sentence if `values` is None."""


def imacs(
    attribution: Tensor,
    mask: ImageInput,
    *,
    penalty: float = 3.0,
    threshold: float = 0.4,
    preset: str | Preset = "paper",
    direction: Direction | str = Direction.REFERENCE_TO_GENERATED,
    invert: bool | None = None,
    processed: bool = False,
    stretch: bool = False,
    undefined: Undefined = "raise",
) -> Tensor:
    """Share of attribution that falls inside a mask, minus the penalised share outside (eq 18).

    ``sum(M x) / sum(x) - penalty * sum(M (1 - x)) / sum(1 - x)``, where ``M`` is the map after
    min-max, resizing to the mask's pixels and thresholding, and ``x`` the mask. Computed in fp64.

    A sample has no score if its mask is empty or full, or its map constant.

    Args:
        attribution: Raw maps ``[batch, height, width]``, any real dtype.
        mask: ``[batch, H, W]`` in [0, 1] at pixel size, 1 inside, or anything else that is one
            mask per sample to :func:`i2am.data.arrays.masks`. The inpainting mask for R2G
            (IMACS_g), the reference mask for G2R (IMACS_r).
        penalty: Weight of the mean outside the mask.
        threshold: Largest normalized value that is dropped.
        preset: ``"paper"``, ``"official"`` (the published arithmetic) or a :class:`Preset`.
        direction: What the maps are. The paper scores both alike; the published code multiplies G2R
            maps by the mask first, and inverts R2G maps.
        invert: Score ``1 - M`` (before the threshold) or not. None leaves it to the preset:
            official inverts R2G maps, which is meant for layers with a single reference token.
        processed: The maps are normalized, thresholded and at the mask's size already, so that only
            eq 18 is left to do.
        stretch: Whether mask and maps may differ in shape by more than a cell, where the model
            squeezes its pictures.
        undefined: What a sample without a score does: ``"raise"`` or give ``"nan"``.

    Returns:
        fp64 ``[batch]`` in [-penalty, 1].

    Raises:
        ValueError: If a shape is wrong, the batches differ, a map holds NaN or Inf, a mask is none
            or has another shape than the maps, a processed map has another size than its mask or
            leaves [0, 1], an option is unknown, or, under ``undefined="raise"``, a sample has no
            score.

    Example:
        >>> attribution = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
        >>> imacs(attribution, torch.tensor([[[0, 1], [0, 1]]]))
        tensor([1.], dtype=torch.float64)
    """
    preset, direction = get_preset(preset), Direction(direction)
    if undefined not in ("raise", "nan"):
        raise ValueError(f"undefined must be 'raise' or 'nan', got {undefined!r}")
    # an empty batch has no masks to read
    if not (isinstance(mask, Tensor) and len(mask) == 0):
        mask = mask_batch(mask, "mask")
    _check_pair(attribution, mask)
    if not (stretch or processed):
        size, grid = ((one.shape[1], one.shape[2]) for one in (mask, attribution))
        require_grid("mask", size, "the maps", grid, options=_STRETCH)
    attribution, inside = attribution.double(), mask.double()
    to_reference = direction is Direction.GENERATED_TO_REFERENCE
    epsilon = preset.reference_epsilon if to_reference else 0.0
    reasons = {
        "its mask is empty": inside.sum((-2, -1)) == 0,
        "its mask is full": (1 - inside).sum((-2, -1)) == 0,
    }
    if processed:
        _check_processed(attribution, inside)
    else:
        if to_reference and preset.reference_mask_product:
            attribution = mask_product(attribution, inside)
        if invert is None:
            invert = preset.invert_single_token and not to_reference
        reasons["its map is constant"] = is_constant(attribution).flatten()
        attribution = picture(
            attribution,
            (mask.shape[-2], mask.shape[-1]),
            preset=preset,
            threshold=threshold,
            invert=invert,
            epsilon=epsilon,
        )
    without = torch.stack(list(reasons.values())).any(0)
    if undefined == "raise" and bool(without.any()):
        sample = int(without.nonzero()[0])
        reason = next(reason for reason, samples in reasons.items() if samples[sample])
        raise ValueError(
            f"sample {sample} has no score because {reason}; undefined='nan' gives NaN instead"
        )
    outside = 1 - inside
    share_inside = (attribution * inside).sum((-2, -1)) / (inside.sum((-2, -1)) + epsilon)
    share_outside = (attribution * outside).sum((-2, -1)) / (outside.sum((-2, -1)) + epsilon)
    return (share_inside - penalty * share_outside).masked_fill(without, torch.nan)


def imacs_scores(
    maps: AttributionMaps,
    *,
    mask: ImageInput | None = None,
    reference_mask: ImageInput | None = None,
    preset: str | Preset = "paper",
    penalty: float = 3.0,
    threshold: float = 0.4,
    layer_weighting: LayerWeighting = "paper",
    undefined: Undefined = "raise",
) -> dict[str, Score]:
    """Every IMACS that a result and its masks define; a reason for each that they do not.

    | name | map | mask |
    | --- | --- | --- |
    | ``imacs_g`` | R2G, uniform votes | inpainting mask |
    | ``imacs_g_share`` | R2G, share of the recorded reference mask | inpainting mask |
    | ``imacs_g_mask_votes`` | R2G, votes of the recorded reference mask | inpainting mask |
    | ``imacs_r`` | G2R, weighted by the recorded inpainting mask (eq 17) | reference mask |

    Under ``preset="official"`` G2R is not weighted but multiplied by the reference mask, and R2G is
    inverted where all layers have a single reference token.

    A score is of one reference: where several were recorded, or words of the prompt alone, there is
    none. Words beside a reference change nothing.

    Args:
        maps: The result.
        mask: Inpainting mask at pixel size, as for ``record(mask=)``: one for all samples or one
            per sample, of the shape of the picture that was painted on. Where the run cropped that
            picture, the mask is cropped alike.
        reference_mask: Mask of the reference's subject, likewise.
        preset: ``"paper"``, ``"official"`` or a :class:`Preset`.
        penalty, threshold, undefined: As for :func:`imacs`.
        layer_weighting: As for :meth:`AttributionMaps.reference_to_generated`.

    Returns:
        A :class:`Score` for each of the four names.

    Raises:
        ValueError: As :func:`imacs` does, if sums are not finite, naming layer and head, or if a
            mask is neither one nor one per sample, or has another shape than its picture.
    """
    preset = get_preset(preset)
    r2g, g2r = Direction.REFERENCE_TO_GENERATED, Direction.GENERATED_TO_REFERENCE
    if reason := _no_score(maps):
        return {name: Score(None, reason) for name in IMACS_NAMES}
    shown = Shown(maps, preset)
    maps = shown.maps
    if broken := nonfinite(maps.layer_sums):
        raise ValueError(f"maps must be finite, got NaN or Inf in {'; '.join(broken)}")
    weights: Literal["uniform", "mask"] = "mask" if preset.query_mask else "uniform"

    no_mask = (mask is None, "no inpainting mask was given")
    no_r2g = (r2g not in maps.directions, "reference_to_generated was not recorded")
    no_votes = ("mask" not in maps.votes, "no reference mask was given to the recording")
    no_share = (
        any(layer.attention_share is None for layer in layers_of(maps.layer_sums, preset)),
        "the attention share was not recorded",
    )
    no_grid = (bool(shown.gridless), f"no reference grid in {', '.join(shown.gridless)}")
    obstacles = {
        "imacs_g": [no_mask, no_r2g],
        "imacs_g_share": [no_mask, no_r2g, no_votes, no_grid, no_share],
        "imacs_g_mask_votes": [no_mask, no_r2g, no_votes, no_grid],
        "imacs_r": [
            (reference_mask is None, "no reference mask was given"),
            no_grid,
            (g2r not in maps.directions, "generated_to_reference was not recorded"),
            (weights not in maps.rows, "no inpainting mask was given to the recording"),
        ],
    }
    attributions: dict[str, Callable[..., Tensor]] = {
        "imacs_g": partial(maps.reference_to_generated, votes="uniform", measure="spread"),
        "imacs_g_share": partial(maps.reference_to_generated, votes="mask", measure="share"),
        "imacs_g_mask_votes": partial(maps.reference_to_generated, votes="mask", measure="spread"),
        "imacs_r": partial(maps.generated_to_reference, weights=weights),
    }

    scores = {}
    for name, read in attributions.items():
        reason = next((reason for stands, reason in obstacles[name] if stands), None)
        which: Which = "reference" if name == "imacs_r" else "generated"
        inside = reference_mask if name == "imacs_r" else mask
        if reason is not None or inside is None:
            scores[name] = Score(None, reason)
            continue
        values = imacs(
            read(preset=preset, layer_weighting=layer_weighting).cpu(),
            _laid(inside, maps, which),
            stretch=seen(maps.provenance, which) is not None,
            penalty=penalty,
            threshold=threshold,
            preset=preset,
            direction=g2r if name == "imacs_r" else r2g,
            invert=shown.invert and name in ("imacs_g", "imacs_g_mask_votes"),
            undefined=undefined,
        )
        scores[name] = Score(values, None)
    return scores


def _no_score(maps: AttributionMaps) -> str | None:
    """Why there is no score, which is of one reference; None where there is exactly one."""
    names = sources(maps.layer_sums, "reference")
    if not names:
        return f"no reference was recorded, only words of the prompt: {', '.join(maps.sources)}"
    if len(names) > 1:
        return (
            f"a score is of one reference, and {len(names)} were recorded: {', '.join(names)}; "
            "choose one with select(source=...)"
        )
    return None


def _check_pair(attribution: Tensor, mask: Tensor) -> None:
    for name, value in (("attribution", attribution), ("mask", mask)):
        if value.ndim != 3 or 0 in value.shape[1:]:
            raise ValueError(f"{name} must be [batch, height, width], got {list(value.shape)}")
    if len(attribution) != len(mask):
        raise ValueError(
            f"attribution and mask must have the same batch, got {len(attribution)} and {len(mask)}"
        )


def _check_processed(attribution: Tensor, mask: Tensor) -> None:
    if attribution.shape != mask.shape:
        raise ValueError(
            "processed attribution must have the mask's size, "
            f"got {list(attribution.shape)} and {list(mask.shape)}"
        )
    if not bool(((attribution >= 0) & (attribution <= 1)).all()):
        raise ValueError("processed attribution must hold values in [0, 1], got values outside")


def _laid(given: ImageInput, maps: AttributionMaps, which: Which) -> Tensor:
    """One mask per sample, over the part of its picture that the maps lie on."""
    name = "reference_mask" if which == "reference" else "mask"
    mask = mask_batch(given, name).cpu()
    if len(mask) not in (1, maps.n_samples):
        raise ValueError(
            f"{name} must be one mask or one for each of {maps.n_samples} samples, got {len(mask)}"
        )
    picture = seen(maps.provenance, which)
    if picture is not None and picture.size is not None:
        size = (mask.shape[1], mask.shape[2])
        of = "the picture that was recorded"
        require_shape(name, size, of, picture.size)
    if picture is not None and picture.box is not None:
        mask = cut_mask(mask, picture.box)
    return mask.expand(maps.n_samples, -1, -1)
