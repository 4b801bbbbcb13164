"""Published checkpoints, translated into folders in diffusers layout.

    i2am.models.conversion.convert("model.ckpt", "folder", system="paint-by-example")
    pipe = i2am.models.load_pipeline("folder")

Every name is imported when it is first used: diffusers and transformers are slow to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
