"""What ``i2am record`` calls a pipeline with: its inputs, its size, its sampler."""

from dataclasses import replace
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image

from i2am.cli.errors import InputRejected
from i2am.cli.settings import Inputs, Settings
from i2am.layouts.token_layout import TokenLayout

if TYPE_CHECKING:
    from i2am.models.base import ReferencePipeline

# the field of Settings and Inputs, the pipeline's argument, and what it is
_OPTIONAL = (
    ("pose", "pose_image", "pose"),
    ("agnostic", "agnostic_image", "agnostic image"),
    ("warped", "warped_image", "warped garment"),
    ("warped_mask", "warped_mask_image", "mask of a warped garment"),
)


def check_model(pipe: "ReferencePipeline", settings: Settings) -> None:
    """Refuse inputs that the pipeline does not take, and missing ones that it needs.

    Raises:
        InputRejected: There is one.
    """
    takes = signature(type(pipe).__call__).parameters
    for name, argument, what in _OPTIONAL:
        option = f"--{name.replace('_', '-')}"
        given = getattr(settings, name) is not None
        if given and argument not in takes:
            raise InputRejected(f"model {settings.model} takes no {what}, leave {option} out")
        if not given and argument in pipe.needs:
            raise InputRejected(
                f"model {settings.model} needs a {what}, give {option}"
                + ("; no model of i2am makes one" if name.startswith("warped") else "")
            )


def complete(pipe: "ReferencePipeline", settings: Settings) -> Settings:
    """The settings with the numbers of the sampler, which the pipeline then has, filled in.

    What was asked for comes first, then the named sampler, then the pipeline's own defaults.

    Raises:
        InputRejected: The numbers do not go together.
    """
    defaults = {
        name: parameter.default
        for name, parameter in signature(type(pipe).__call__).parameters.items()
    }
    if settings.sampler is not None:
        defaults |= pipe.use_sampler(settings.sampler)
    steps, guidance = settings.steps, settings.guidance
    try:
        return replace(
            settings,
            steps=defaults["num_inference_steps"] if steps is None else steps,
            guidance=defaults["guidance_scale"] if guidance is None else guidance,
        )
    except ValueError as error:
        raise InputRejected(f"{error}, by default of {settings.model}") from error


def generated_size(
    pipe: "ReferencePipeline", settings: Settings, inputs: Inputs
) -> tuple[int, int]:
    """(height, width) that the denoiser works at.

    Raises:
        InputRejected: The pipeline cannot make that size.
    """
    try:
        return pipe.check_size(*(settings.size or pipe.default_size(inputs.person)))
    except ValueError as error:
        asked = "by default" if settings.size is None else "{}x{}".format(*settings.size)
        raise InputRejected(f"size {asked} does not suit {settings.model}: {error}") from error


def layout_of(pipe: "ReferencePipeline", settings: Settings) -> TokenLayout:
    """The pipeline's layout, with the prefix tokens' votes that the preset wants."""
    return replace(pipe.attribution_layout(), prefix_votes=settings.preset == "official")


def call(
    pipe: "ReferencePipeline", settings: Settings, inputs: Inputs, **changes: Any
) -> list[Image]:
    """Run the pipeline with the inputs and settings; `changes` replace single arguments.

    Raises:
        InputRejected: The pipeline cannot make that size.
    """
    generated_size(pipe, settings, inputs)
    takes = signature(type(pipe).__call__).parameters
    arguments: dict[str, Any] = {
        "image": inputs.person,
        "mask_image": inputs.mask,
        "reference_image": inputs.reference,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
        "generator": torch.Generator().manual_seed(settings.seed),
    }
    if settings.size is not None:
        arguments["height"], arguments["width"] = settings.size
    if settings.paste_back is not None:
        arguments["paste_back"] = settings.paste_back
    for name, argument, _ in _OPTIONAL:
        if getattr(inputs, name) is not None:
            arguments[argument] = getattr(inputs, name)
    if inputs.reference_mask is not None and "reference_mask_image" in takes:
        arguments["reference_mask_image"] = inputs.reference_mask
    arguments |= changes
    if inputs.agnostic and pipe.agnostic_replaces_person and not arguments.get("paste_back"):
        del arguments["image"], arguments["mask_image"]
    return pipe(**arguments).images
