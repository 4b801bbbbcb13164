"""What is known of the guidance parts of pipelines: which is which, in one batch and in calls."""

from dataclasses import dataclass
from typing import Any

from i2am.layouts.token_layout import CONDITIONAL, UNCONDITIONAL, TokenLayout

_Orders = list[tuple[str, ...]]

# by class, or a class it inherits from; one order for every number of parts
_BATCHES: dict[str, _Orders] = {
    "StableDiffusionInstructPix2PixPipeline": [(CONDITIONAL, "image", UNCONDITIONAL)],
    "StableDiffusionXLInstructPix2PixPipeline": [(CONDITIONAL, "image", UNCONDITIONAL)],
    "PAGMixin": [(UNCONDITIONAL, CONDITIONAL, "perturbed"), (CONDITIONAL, "perturbed")],
    "OmniGenPipeline": [(CONDITIONAL, UNCONDITIONAL, "image"), (CONDITIONAL, UNCONDITIONAL)],
    "DreamLitePipeline": [(UNCONDITIONAL, "image", CONDITIONAL), (UNCONDITIONAL, CONDITIONAL)],
    "LuminaPipeline": [(CONDITIONAL, UNCONDITIONAL)],
    "StableCascadeDecoderPipeline": [(CONDITIONAL, UNCONDITIONAL)],
    "StableCascadePriorPipeline": [(CONDITIONAL, UNCONDITIONAL)],
}

_CALLS = {
    # without guidance the second call sees blurred latents
    "StableDiffusionSAGPipeline": (CONDITIONAL, "degraded"),
    # all of diffusers' that call once per part
    "DiffusionPipeline": (CONDITIONAL, UNCONDITIONAL),
}


@dataclass(frozen=True)
class GuidanceOrder:
    """Names of the guidance parts, in order."""

    batch: tuple[str, ...] = (UNCONDITIONAL, CONDITIONAL)
    """The parts of one batch."""
    calls: tuple[str, ...] | None = None
    """The calls of one evaluation, where each part is a call of its own; ``None``: unknown."""


def guidance_order(pipe_or_denoiser: Any, layout: TokenLayout) -> GuidanceOrder:
    """What the layout declares, or else what is known of the pipeline, or else of most.

    Raises:
        ValueError: The layout contradicts what is known of the pipeline.
    """
    declared = layout.guidance_order
    batches, calls = _of(_BATCHES, pipe_or_denoiser), None
    # a loop of one's own in a subclass may do otherwise than the pipeline that it is based on
    loops = [cls for cls in type(pipe_or_denoiser).__mro__ if "__call__" in vars(cls)]
    if loops and loops[0].__module__.partition(".")[0] == "diffusers":
        calls = _of(_CALLS, pipe_or_denoiser)
    if declared is None:
        return GuidanceOrder(batches[0] if batches else GuidanceOrder.batch, calls)
    if batches and declared not in batches:
        raise ValueError(
            f"guidance_order of the layout must be {' or '.join(map(str, batches))} for "
            f"{type(pipe_or_denoiser).__name__}, got {declared}"
        )
    return GuidanceOrder(declared, calls or declared)


def _of(known: dict[str, Any], pipe_or_denoiser: Any) -> Any:
    found = (known.get(cls.__name__) for cls in type(pipe_or_denoiser).__mro__)
    return next((value for value in found if value is not None), None)
