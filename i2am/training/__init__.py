"""Training of the custom model: `train` and the recipes it runs.

Every name is imported when it is first used: accelerate and diffusers are slow to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# for type checkers, who cannot follow __getattr__
# ruff: noqa: F401
if TYPE_CHECKING:
    from i2am.training.recipe import PAPER_RECIPE, POCKET_RECIPE, Recipe
    from i2am.training.run import train

_MODULES = {
    "PAPER_RECIPE": "recipe",
    "POCKET_RECIPE": "recipe",
    "Recipe": "recipe",
    "train": "run",
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
