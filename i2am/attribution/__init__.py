"""Attribution maps: what is accumulated, on which grids, and how it is read, drawn and stored."""

from i2am.attribution.accumulator import Accumulator
from i2am.attribution.direction import Direction
from i2am.attribution.grid import (
    Box,
    Grid,
    Patch,
    Region,
    as_regions,
    describe_regions,
    mask_weights,
    region_weights,
    resize,
)
from i2am.attribution.maps import AttributionMaps
from i2am.attribution.pairs import PairMaps
from i2am.attribution.postprocess import normalize, picture, threshold
from i2am.attribution.presets import OFFICIAL, PAPER, Preset, get_preset
from i2am.attribution.storage import load_maps, save_maps
from i2am.attribution.sums import AttentionSite, LayerSums

__all__ = [
    "OFFICIAL",
    "PAPER",
    "Accumulator",
    "AttentionSite",
    "AttributionMaps",
    "Box",
    "Direction",
    "Grid",
    "LayerSums",
    "PairMaps",
    "Patch",
    "Preset",
    "Region",
    "as_regions",
    "describe_regions",
    "get_preset",
    "load_maps",
    "mask_weights",
    "normalize",
    "picture",
    "region_weights",
    "resize",
    "save_maps",
    "threshold",
]
