"""Which layout belongs to which pipeline or denoiser: by the name of its class."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from torch import nn

from i2am.layouts.token_layout import TokenLayout

Make = Callable[[Any, nn.Module], TokenLayout | None]
"""``make(pipe, denoiser)``: the layout, ``None`` where it is not this family's after all; ``pipe``
is the denoiser itself where there is no pipeline."""

# class name -> module of this package and its function; a class answers for those that inherit
_PIPELINES: dict[str, str] = {}
_DENOISERS: dict[str, str] = {
    "ChromaTransformer2DModel": "flux:chroma",
    "Flux2Transformer2DModel": "flux2:flux2",
    "FluxTransformer2DModel": "flux:flux",
    "QwenImageTransformer2DModel": "qwen:qwen",
    "SD3Transformer2DModel": "sd3:sd3",
    "ZImageTransformer2DModel": "zimage:zimage",
}
_REGISTERED: dict[str, Make] = {}


def register_layout(class_name: str, make: Make) -> None:
    """Make ``record(pipe)`` find a layout for pipelines or denoisers of a class.

    Args:
        class_name: Name of the class; one that inherits from it is found too. A layout that is
            registered goes before those of i2am.
        make: Given the pipeline and its denoiser (twice the denoiser where it comes alone).

    Example:
        >>> register_layout("MyPipeline", lambda pipe, denoiser: TokenLayout.same_grid())
    """
    _REGISTERED[class_name] = make


def known_layout(pipe: Any, denoiser: nn.Module) -> TokenLayout | None:
    """The layout of a pipeline's class, else of its denoiser's; ``None`` where neither is known."""
    for table, subject in (
        (_REGISTERED, pipe),
        (_REGISTERED, denoiser),
        (_PIPELINES, pipe),
        (_DENOISERS, denoiser),
    ):
        layout = _first(table, subject, pipe, denoiser)
        if layout is not None:
            return layout
    return None


def _first(
    table: Mapping[str, str | Make], subject: Any, pipe: Any, denoiser: nn.Module
) -> TokenLayout | None:
    for cls in type(subject).__mro__:
        make = table.get(cls.__name__)
        if isinstance(make, str):
            module, _, function = make.partition(":")
            make = getattr(import_module(f"i2am.layouts.{module}"), function)
        if make is not None and (layout := make(pipe, denoiser)) is not None:
            return layout
    return None
