"""What a caller may hand to ``record()``: pipelines and denoisers; what is known of them."""

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from i2am.layouts.token_layout import TokenLayout

_DENOISER = re.compile(r"(^|_)(unet|transformer)(_|$)")


def find_denoiser(pipe_or_denoiser: Any) -> tuple[nn.Module, Any | None]:
    """The UNet or transformer, and the pipeline's scheduler if there is one.

    Raises:
        TypeError: There is neither.
        NotImplementedError: There are several, or the denoiser is sharded over devices.
    """
    scheduler = None
    if isinstance(pipe_or_denoiser, nn.Module):
        denoiser: Any = pipe_or_denoiser
    else:
        components = getattr(pipe_or_denoiser, "components", None) or {}
        found = [
            name for name, part in components.items() if part is not None and _DENOISER.search(name)
        ]
        if len(found) > 1:
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
        denoiser, scheduler = components[found[0]], components.get("scheduler")
    if getattr(denoiser, "_parallel_config", None) is not None:
        raise NotImplementedError(
            "recording a denoiser with context or tensor parallelism is not supported"
        )
    return denoiser, scheduler


def find_layout(pipe_or_denoiser: Any, denoiser: nn.Module) -> TokenLayout:
    """The layout a pipeline declares, or that its components imply.

    Raises:
        ValueError: None is known.
    """
    declared = getattr(pipe_or_denoiser, "attribution_layout", None)
    if declared is not None:
        layout: TokenLayout = declared()
        return layout
    return _implied_layout(pipe_or_denoiser, denoiser)


def _implied_layout(pipe_or_denoiser: Any, denoiser: nn.Module) -> TokenLayout:
    adapters = getattr(denoiser, "encoder_hid_proj", None)
    for projection in getattr(adapters, "image_projection_layers", ()):
        # only this variant keeps the patches of its encoder apart
        if type(projection).__name__ == "IPAdapterFullImageProjection":
            encoder = getattr(pipe_or_denoiser, "image_encoder", None)
            if encoder is None:
                break
            side = encoder.config.image_size // encoder.config.patch_size
            return TokenLayout.ip_adapter((side, side), prefix=1)
        return TokenLayout.ip_adapter()
    if type(pipe_or_denoiser).__name__ == "PaintByExamplePipeline":
        return TokenLayout.single_token()
    raise ValueError(
        f"layout must be given for {type(pipe_or_denoiser).__name__}, whose reference tokens are "
        "not known; for instance layout=TokenLayout.cross_attention(grid=(16, 16), prefix=1)"
    )


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    found = {}
    for package in ("i2am", "torch", "diffusers", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
