"""Training of the custom model: `train` and the recipes it runs.

Every name is imported when it is first used: accelerate and diffusers are slow to import.
"""

from typing import TYPE_CHECKING

from i2am.lazy import lazy

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

__getattr__, __dir__ = lazy(__name__, _MODULES)
