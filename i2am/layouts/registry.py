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
_PIPELINES: dict[str, str] = {
    "StableDiffusionPipeline": "text:text_to_image",
    "StableDiffusionXLPipeline": "text:text_to_image",
    "KolorsPipeline": "text:text_to_image",
    "LatentConsistencyModelPipeline": "text:text_to_image",
    "StableDiffusionSAGPipeline": "text:text_to_image",
    "StableDiffusionPAGPipeline": "text:text_to_image",
    "StableDiffusionXLPAGPipeline": "text:text_to_image",
    "KolorsPAGPipeline": "text:text_to_image",
    "StableDiffusionImg2ImgPipeline": "text:image_to_image",
    "StableDiffusionXLImg2ImgPipeline": "text:image_to_image",
    "KolorsImg2ImgPipeline": "text:image_to_image",
    "LatentConsistencyModelImg2ImgPipeline": "text:image_to_image",
    "StableDiffusionPAGImg2ImgPipeline": "text:image_to_image",
    "StableDiffusionXLPAGImg2ImgPipeline": "text:image_to_image",
    "StableDiffusionInpaintPipeline": "text:inpainting",
    "StableDiffusionPAGInpaintPipeline": "text:inpainting",
    "StableDiffusionXLPAGInpaintPipeline": "text:inpainting",
    "StableDiffusionXLInpaintPipeline": "reference_unet:idm_vton",
    "StableDiffusionInstructPix2PixPipeline": "text:image_in_channels",
    "StableDiffusionXLInstructPix2PixPipeline": "text:image_in_channels",
    "StableDiffusionDepth2ImgPipeline": "text:image_in_channels",
    "StableDiffusionUpscalePipeline": "text:image_in_channels",
    "StableDiffusionControlNetPipeline": "text:control",
    "StableDiffusionControlNetImg2ImgPipeline": "text:control",
    "StableDiffusionControlNetInpaintPipeline": "text:control",
    "StableDiffusionXLControlNetPipeline": "text:control",
    "StableDiffusionXLControlNetImg2ImgPipeline": "text:control",
    "StableDiffusionXLControlNetInpaintPipeline": "text:control",
    "StableDiffusionXLControlNetUnionPipeline": "text:control",
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": "text:control",
    "StableDiffusionXLControlNetUnionInpaintPipeline": "text:control",
    "StableDiffusionControlNetPAGPipeline": "text:control",
    "StableDiffusionControlNetPAGInpaintPipeline": "text:control",
    "StableDiffusionXLControlNetPAGPipeline": "text:control",
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": "text:control",
    "StableDiffusionAdapterPipeline": "text:control",
    "StableDiffusionXLAdapterPipeline": "text:control",
    "PaintByExamplePipeline": "cross_attention:paint_by_example",
    "CatVTONPipeline": "spatial:catvton",
    "CatVTONPix2PixPipeline": "spatial:catvton",
    "OotdPipeline": "reference_unet:ootdiffusion",
    "WanPipeline": "wan:text_to_video",
    "WanVideoToVideoPipeline": "wan:video_to_video",
    "LucyEditPipeline": "wan:video_to_video",
    "WanImageToVideoPipeline": "wan:image_to_video",
    "WanVACEPipeline": "wan:vace",
}
_DENOISERS: dict[str, str] = {
    "UNet2DConditionModel": "ip_adapter:known",
    "UNetVton2DConditionModel": "reference_unet:ootdiffusion",
    "WanTransformer3DModel": "wan:transformer",
    "WanVACETransformer3DModel": "wan:vace",
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
    # torch.compile wraps a module in one of a class of its own
    pipe, denoiser = (getattr(part, "_orig_mod", part) for part in (pipe, denoiser))
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
