"""IMACS of one recording as JSON values: a number, or null and the reason."""

import math
from typing import TypedDict

from torch import Tensor

from i2am.attribution import AttributionMaps
from i2am.attribution.layers import nonfinite
from i2am.metrics import imacs_scores

NAMES = ("imacs_g", "imacs_g_mask_votes", "imacs_r")


class Entry(TypedDict):
    """One score."""

    value: float | None
    reason: str | None


def score(
    maps: AttributionMaps, *, mask: Tensor, reference_mask: Tensor | None, preset: str
) -> dict[str, Entry]:
    """Every IMACS by name.

    Args:
        maps: A recording of one sample.
        mask: Inpainting mask ``[height, width]``.
        reference_mask: Mask of the reference's subject, if there is one.
        preset: "paper" or "official".
    """
    broken = nonfinite(maps.layer_sums)
    if broken:
        return {name: {"value": None, "reason": f"NaN or Inf in {broken[0]}"} for name in NAMES}
    scores = imacs_scores(
        maps, mask=mask, reference_mask=reference_mask, preset=preset, undefined="nan"
    )
    entries: dict[str, Entry] = {}
    for name, (values, reason) in scores.items():
        value = None if values is None else float(values[0])
        if value is not None and math.isnan(value):
            # masks were checked when they were read, so only the map can be at fault
            value, reason = None, "its map is the same everywhere"
        entries[name] = {"value": value, "reason": reason}
    return entries
