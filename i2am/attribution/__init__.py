"""Attribution maps: what is accumulated, on which grids, and how it is read."""

from i2am.attribution.direction import Direction
from i2am.attribution.grid import Grid, Patch, Region, mask_weights, region_weights, resize

__all__ = [
    "Direction",
    "Grid",
    "Patch",
    "Region",
    "mask_weights",
    "region_weights",
    "resize",
]
