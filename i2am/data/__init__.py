"""Reading the world's files, and drawing scenes whose correspondence is known.

Every name is imported when it is first used: reading an image needs no torch.
"""

from typing import TYPE_CHECKING

from i2am.lazy import lazy

# for type checkers, who cannot follow __getattr__
# ruff: noqa: F401
if TYPE_CHECKING:
    from i2am.data.arrays import object_mask
    from i2am.data.images import ImageRejected
    from i2am.data.paper_doll import PaperDolls, Scenes, render, write_viton_hd
    from i2am.data.vitonhd import DataRejected, VitonHD

_MODULES = {
    "DataRejected": "vitonhd",
    "ImageRejected": "images",
    "PaperDolls": "paper_doll",
    "Scenes": "paper_doll",
    "VitonHD": "vitonhd",
    "object_mask": "arrays",
    "render": "paper_doll",
    "write_viton_hd": "paper_doll",
}

__all__ = sorted(_MODULES)

__getattr__, __dir__ = lazy(__name__, _MODULES)
