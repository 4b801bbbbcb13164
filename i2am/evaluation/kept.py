"""What a shard keeps of a batch's maps: IMACS, with a reason wherever there is none, and means."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from i2am.attribution import AttributionMaps
from i2am.attribution.layers import nonfinite
from i2am.attribution.presets import get_preset
from i2am.attribution.reduction import layers_of, missing_for_official
from i2am.attribution.shown import Shown
from i2am.evaluation.shard import SAMPLE, Reason
from i2am.metrics import imacs_scores
from i2am.metrics.names import IMACS_NAMES

SCORES = (*IMACS_NAMES, "imacs_g_official", "imacs_r_official")
"""Names of the scores of a sample: the paper's, then what the published code's rules make of the
same sums."""

_PRESETS = {"paper": "", "official": "_official"}


def score(
    maps: AttributionMaps, masks: Tensor, reference_masks: Tensor, recorded_as: str
) -> tuple[Tensor, list[dict[str, Reason]]]:
    """Every score of every sample.

    Args:
        maps: The maps of the batch.
        masks: Inpainting masks at pixel size ``[samples, H, W]`` in [0, 1].
        reference_masks: Masks of the garments, likewise.
        recorded_as: The preset of the recording, which decides who voted in R2G.

    Returns:
        fp64 ``[samples, scores]``, in the order of `SCORES`, and per sample the reason of each NaN
        by name, or by `SAMPLE` where its sums are not finite.
    """
    values = torch.full((maps.n_samples, len(SCORES)), math.nan, dtype=torch.float64)
    reasons: list[dict[str, Reason]] = [{} for _ in range(maps.n_samples)]
    whole = []
    for sample in range(maps.n_samples):
        if broken := nonfinite(maps.select(samples=sample).layer_sums):
            place = broken[0].replace("(first: sample 0, ", "(first: ")
            reasons[sample][SAMPLE] = Reason("nonfinite_map", f"NaN or Inf in {place}")
        else:
            whole.append(sample)
    if not whole:
        return values, reasons
    finite = maps if len(whole) == maps.n_samples else maps.select(samples=whole)
    for preset, suffix in _PRESETS.items():
        with warnings.catch_warnings():
            # what an approximate R2G lacks is told by `_inexact`
            warnings.simplefilter("ignore")
            found = imacs_scores(
                finite,
                mask=masks[whole],
                reference_mask=reference_masks[whole],
                preset=preset,
                undefined="nan",
            )
        for name in IMACS_NAMES:
            if f"{name}{suffix}" not in SCORES:
                continue
            column = SCORES.index(f"{name}{suffix}")
            scores, reason = found[name]
            reason = reason or _inexact(finite, name, preset, recorded_as)
            inside = reference_masks if name == "imacs_r" else masks
            for row, sample in enumerate(whole):
                value = math.nan if reason or scores is None else float(scores[row])
                values[sample, column] = value
                if math.isnan(value):
                    why = Reason("not_defined", reason) if reason else _undefined(inside[sample])
                    reasons[sample][SCORES[column]] = why
    return values, reasons


def kept_maps(maps: AttributionMaps, dtype: torch.dtype) -> dict[str, Tensor]:
    """The maps that a shard stores, averaged over layers, with their scales.

    Args:
        maps: The maps of a batch.
        dtype: float16 or float32. A map is divided by its largest value first, so that float16
            loses 11 bits of precision and nothing of the range.

    Returns:
        ``r2g_uniform``, ``r2g_mask``, ``g2r_uniform`` and ``g2r_mask``, as far as they were
        recorded, ``[samples, time groups, heads, h, w]``, one head where layers differ in how many
        they have; and ``<name>_scale`` float32 ``[samples, time groups, heads]``.
    """
    shown, found = Shown(maps), {}
    if "uniform" in maps.votes:
        found["r2g_uniform"] = shown.r2g(_axes(shown))
    if shown.placed is not None:
        placed = Shown(shown.placed)
        axes = _axes(placed)
        if "mask" in maps.votes:
            found["r2g_mask"] = placed.r2g(axes, votes="mask")
            found["share_mask"] = placed.r2g(axes, votes="mask", measure="share")
        found["g2r_uniform"] = placed.g2r(axes)
        if "mask" in maps.rows:
            found["g2r_mask"] = placed.g2r(axes, weights="mask")
    kept = {}
    for name, sums in found.items():
        sums = sums.cpu().float()
        sums = sums if sums.ndim == 5 else sums[:, :, None]
        scale = sums.amax((-2, -1))
        kept[name] = (sums / scale.clamp_min(torch.finfo().tiny)[..., None, None]).to(dtype)
        kept[f"{name}_scale"] = scale
    return kept


def failed(reasons: Sequence[Reason]) -> tuple[Tensor, list[dict[str, Reason]]]:
    """What `score` returns for samples that failed, one reason each."""
    values = torch.full((len(reasons), len(SCORES)), math.nan, dtype=torch.float64)
    return values, [{SAMPLE: reason} for reason in reasons]


def _axes(shown: Shown) -> tuple[str, ...]:
    return tuple(axis for axis in shown.axes() if axis != "layer")


def _inexact(maps: AttributionMaps, name: str, preset: str, recorded_as: str) -> str | None:
    """Why R2G, as it was recorded, is not what a preset means by it."""
    if name != "imacs_g":
        return None
    if preset == "paper":
        if recorded_as == "official" and not Shown(maps).single:
            return "prefix tokens voted in this recording, --preset paper keeps them out"
        return None
    counted = layers_of(maps.layer_sums, get_preset("official"))
    missing = missing_for_official(counted, maps.provenance, None)
    if not missing:
        return None
    return f"the recording lacks {' and '.join(missing)}: --preset official records them"


def _undefined(mask: Tensor) -> Reason:
    if not bool(mask.any()):
        return Reason("empty_mask", "its mask is empty")
    if bool((mask == 1).all()):
        return Reason("full_mask", "its mask is full")
    return Reason("degenerate_map", "its map is the same everywhere")
