"""What ``i2am record`` calls a pipeline with: its inputs, its size, its sampler."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image

from i2am.cli.errors import InputRejected
from i2am.cli.settings import FILES, Inputs, Settings
from i2am.layouts.token_layout import TokenLayout

if TYPE_CHECKING:
    from i2am.models.base import ReferencePipeline

# fields of Settings and Inputs that not every pipeline takes, and what they are
_OPTIONAL = {
    "pose": "pose",
    "agnostic": "agnostic image",
    "warped": "warped garment",
    "warped_mask": "mask of a warped garment",
}


def check_model(pipe: "ReferencePipeline", settings: Settings) -> None:
    """Refuse inputs that the pipeline does not take, and missing ones that it needs.

    Raises:
        InputRejected: There is one.
    """
    for name, what in _OPTIONAL.items():
        option = f"--{name.replace('_', '-')}"
        given = getattr(settings, name) is not None
        if given and not pipe.takes(name):
            raise InputRejected(f"model {settings.model} takes no {what}, leave {option} out")
        if not given and pipe.requires(name):
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
    defaults = pipe.sampling_defaults(settings.sampler)
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
    images = {name: getattr(inputs, name) for name in FILES}
    arguments: dict[str, Any] = {
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
        "generator": torch.Generator().manual_seed(settings.seed),
    }
    if settings.size is not None:
        arguments["height"], arguments["width"] = settings.size
    if settings.paste_back is not None:
        arguments["paste_back"] = settings.paste_back
    arguments |= changes
    paste_back = bool(arguments.get("paste_back"))
    return pipe(**pipe.image_arguments(images, paste_back=paste_back), **arguments).images
