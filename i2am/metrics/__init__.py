"""Scores of attribution maps and of the pictures they explain.

``IMACS`` and ``masked_ssim`` need torchmetrics, imported when it is first used.
"""

from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    if name != "IMACS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import torchmetrics  # noqa: F401 - tried here, so that the sentence below can be said
    # a torchvision that does not fit torch breaks the import with a RuntimeError
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            "i2am.metrics.IMACS needs torchmetrics, which could not be imported "
            f"({error}); install it with: pip install torchmetrics"
        ) from error
    from i2am.metrics.metric import IMACS

    globals()[name] = IMACS
    return IMACS


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
