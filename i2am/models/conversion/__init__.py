"""Published checkpoints, translated into folders in diffusers layout.

    i2am.models.conversion.convert("model.ckpt", "folder", system="paint-by-example")
    pipe = i2am.models.load_pipeline("folder")

Every name is imported when it is first used: diffusers and transformers are slow to import.
"""

from typing import TYPE_CHECKING

from i2am.lazy import lazy

# for type checkers, who cannot follow __getattr__
# ruff: noqa: F401
if TYPE_CHECKING:
    from i2am.models.conversion.converting import Conversion, convert
    from i2am.models.conversion.reading import read_checkpoint
    from i2am.models.conversion.rules import SYSTEMS, Target, component_of, convert_tensors

_MODULES = {
    "SYSTEMS": "rules",
    "Conversion": "converting",
    "Target": "rules",
    "component_of": "rules",
    "convert": "converting",
    "convert_tensors": "rules",
    "read_checkpoint": "reading",
}

__all__ = sorted(_MODULES)

__getattr__, __dir__ = lazy(__name__, _MODULES)
