"""What a caller may hand to ``record()``: pipelines and denoisers; what is known of them."""

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from i2am.layouts.registry import known_layout
from i2am.layouts.token_layout import TokenLayout

_DENOISER = re.compile(r"(^|_)(unet|transformer)(_|$)")
# UNets that denoise nothing: IDM-VTON's and OOTDiffusion's make the garment's features
_REFERENCE_UNETS = {"unet_encoder", "unet_garm"}
# of pipelines in stages, which call theirs by what it makes
_STAGES = ("prior", "decoder")
# denoisers that pipelines of Wan 2.2 use one after the other, either of which may be absent
_HALVES = ["transformer", "transformer_2"]
_WAN = {"WanTransformer3DModel", "WanVACETransformer3DModel"}


def find_denoisers(pipe_or_denoiser: Any) -> tuple[tuple[nn.Module, ...], Any | None]:
    """The UNets or transformers that denoise, and the pipeline's scheduler if there is one.

    Args:
        pipe_or_denoiser: A pipeline, any object that has its modules as attributes, or the denoiser
            itself.

    Returns:
        One denoiser, or the two that share the steps of one schedule.

    Raises:
        TypeError: There is none.
        NotImplementedError: There are several others, or one is sharded over devices.
    """
    scheduler = None
    if isinstance(pipe_or_denoiser, nn.Module):
        denoisers: tuple[nn.Module, ...] = (pipe_or_denoiser,)
    else:
        parts = _parts(pipe_or_denoiser)
        found = _denoisers_among(parts)
        if len(found) > 1 and not _share_a_schedule(parts, found):
            raise NotImplementedError(
                f"recording {type(pipe_or_denoiser).__name__} as a whole is not supported: "
                f"pipe_or_denoiser must have one denoiser, got {' and '.join(found)}; pass the one "
                "to record, and scheduler="
            )
        if not found:
            raise TypeError(
                "pipe_or_denoiser must be a diffusers pipeline with a unet or transformer, or that "
                f"module itself, got {type(pipe_or_denoiser).__name__}"
            )
        denoisers = tuple(parts[name] for name in sorted(found))
        scheduler = parts.get("scheduler", parts.get("noise_scheduler"))
    if any(getattr(denoiser, "_parallel_config", None) is not None for denoiser in denoisers):
        raise NotImplementedError(
            "recording a denoiser with context or tensor parallelism is not supported"
        )
    return denoisers, scheduler


def _parts(pipe: Any) -> Mapping[str, Any]:
    components = getattr(pipe, "components", None)
    if isinstance(components, Mapping):
        return components
    return getattr(pipe, "__dict__", {})  # published pipelines that are none of diffusers'


def _denoisers_among(parts: Mapping[str, Any]) -> list[str]:
    modules = [name for name, part in parts.items() if isinstance(part, nn.Module)]
    found = [name for name in modules if _DENOISER.search(name) and name not in _REFERENCE_UNETS]
    # beside a UNet or a transformer they are something else, such as a decoder of latents
    return found or [
        name
        for name in modules
        if name in _STAGES and re.search("UNet|Transformer", type(parts[name]).__name__)
    ]


def _share_a_schedule(parts: Mapping[str, Any], names: list[str]) -> bool:
    kinds = {type(getattr(parts[name], "_orig_mod", parts[name])).__name__ for name in names}
    return sorted(names) == _HALVES and len(kinds) == 1 and kinds <= _WAN


def find_layout(pipe_or_denoiser: Any, denoiser: nn.Module) -> TokenLayout:
    """The layout a pipeline declares, or that is known of its class or its denoiser's.

    Raises:
        ValueError: None is known.
    """
    declared = getattr(pipe_or_denoiser, "attribution_layout", None)
    layout = known_layout(pipe_or_denoiser, denoiser) if declared is None else declared()
    if layout is None:
        name = type(pipe_or_denoiser).__name__
        raise ValueError(
            f"layout must be given for {name}, whose tokens are not known: pass layout=, a "
            "TokenLayout that says what they are, or declare one for the class by "
            f"i2am.layouts.register_layout({name!r}, ...)"
        )
    return layout


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    found = {}
    for package in ("i2am", "torch", "diffusers", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
