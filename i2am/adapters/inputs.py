"""What a caller may hand to ``record()``: pipelines, denoisers, masks; what is known of them."""

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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


def as_mask(name: str, mask: Any) -> Tensor | None:
    """A mask from a tensor, an array, a PIL image or a list of these, fp32 in [0, 1].

    Raises:
        ValueError: Its values lie outside [0, 1] (uint8: [0, 255]), it has colour channels or other
            axes than ``[height, width]``, or the masks of a list differ in size.
    """
    if mask is None:
        return None
    if isinstance(mask, list | tuple):
        masks = [as_mask(name, item) for item in mask]
        if len({item.shape for item in masks if item is not None}) != 1:
            raise ValueError(f"{name} must be masks of one size, got {len(masks)} that differ")
        return torch.stack([item for item in masks if item is not None]).flatten(0, -3)
    coloured = False
    if not isinstance(mask, Tensor):
        if hasattr(mask, "convert"):  # a PIL image
            mask = mask.convert("L")
        mask = torch.from_numpy(np.array(mask))
        # an array of a picture would pass for a batch
        coloured = mask.ndim == 3 and mask.shape[2] in (3, 4)
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.ndim not in (2, 3) or coloured:
        raise ValueError(
            f"{name} must be [height, width] or [batch, height, width] without colour channels, "
            f"got {list(mask.shape)}"
        )
    values = mask.float() / 255 if mask.dtype == torch.uint8 else mask.float()
    # written so that NaN fails too
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(
            f"{name} must hold values in [0, 1] (uint8: [0, 255]), got "
            f"{values.min():.3g} to {values.max():.3g}"
        )
    return values


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    found = {}
    for package in ("i2am", "torch", "diffusers", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
