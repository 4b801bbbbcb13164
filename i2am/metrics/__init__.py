"""Scores of attribution maps and of the pictures they explain.

An ``IMACS`` and ``masked_ssim`` need torchmetrics, imported when it is first used; without it both
say so when they are called.
"""

from typing import TYPE_CHECKING

from i2am.lazy import lazy
from i2am.metrics.functional import Score, imacs, imacs_scores
from i2am.metrics.pck import centroid, pck, peak
from i2am.metrics.pictures import masked_l1, masked_ssim

if TYPE_CHECKING:
    from i2am.metrics.metric import IMACS

__all__ = [
    "IMACS",
    "Score",
    "centroid",
    "imacs",
    "imacs_scores",
    "masked_l1",
    "masked_ssim",
    "pck",
    "peak",
]


__getattr__, __dir__ = lazy(__name__, {"IMACS": "metric"})
