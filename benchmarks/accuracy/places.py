"""Query cells on the shirt, their true places on the garment, and how well a guess would do."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from i2am.attribution import Grid
from i2am.data.paper_doll import SIZE, Scenes
from i2am.metrics import pck

GRID: Grid = (16, 12)
"""Cells of both images: the patches of the garment encoder, and the finest recorded queries."""
CELL = SIZE[0] // GRID[0]
DIAGONAL = math.hypot(*GRID)
THRESHOLDS = (0.05, 0.10)
PERCENT = ("5", "10")


class Places(NamedTuple):
    """The query cells of a batch of scenes, scene after scene."""

    scene: Tensor
    """int64 ``[n]``, position in the batch."""
    cell: Tensor
    """int64 ``[n]``, index of the query cell in reading order."""
    true: Tensor
    """fp64 ``[n, 2]``, the garment's place that it shows: (y, x) in cells, see i2am.metrics.pck."""


def query_places(scenes: Scenes, *, share: float = 0.5) -> Places:
    """The cells that show the garment in more than `share` of their pixels; the mean of their flow.

    Args:
        scenes: A batch.
        share: Smallest share of pixels, exclusive.
    """
    visible = (scenes.garment_region > 0).double()
    covered = F.avg_pool2d(visible[:, None], CELL)[:, 0].flatten(1)
    flow = scenes.flow.double().where(visible[:, None] > 0, 0.0)
    place = F.avg_pool2d(flow, CELL).flatten(2).mT / covered[..., None]
    scene, cell = (covered > share).nonzero(as_tuple=True)
    return Places(scene, cell, place[scene, cell] * torch.tensor(GRID))


def centres() -> Tensor:
    """fp64 ``[cells, 2]``: the centres of all cells in reading order."""
    return torch.cartesian_prod(*(torch.arange(side).double() + 0.5 for side in GRID))


def shares(predicted: Tensor, true: Tensor) -> dict[str, float]:
    """PCK by the threshold in per cent."""
    return {
        percent: float(pck(predicted, true, threshold=threshold, diagonal=DIAGONAL))
        for percent, threshold in zip(PERCENT, THRESHOLDS, strict=True)
    }


def guesses(scenes: Scenes, places: Places) -> dict[str, Tensor]:
    """How likely a guess that never looks at attention is right.

    Returns:
        fp64 ``[n, thresholds]`` by the name of the guess: a random cell, a random place of the
        garment, the garment's centre, or the same position as in the generated image.
    """
    middle = centres()
    garment = F.avg_pool2d(scenes.garment_mask[:, None].double(), CELL)[:, 0].flatten(1)
    garment = garment / garment.sum(1, keepdim=True)

    def near(guess: Tensor) -> Tensor:
        distance = (guess - places.true[:, None]).norm(dim=-1)
        return torch.stack([distance <= share * DIAGONAL for share in THRESHOLDS], -1).double()

    anywhere = near(middle)
    return {
        "uniform chance": anywhere.mean(1),
        "uniform on the garment": (anywhere * garment[places.scene, :, None]).sum(1),
        "garment centre": near((garment @ middle)[places.scene, None])[:, 0],
        "same image position": near(middle[places.cell, None])[:, 0],
    }
