"""What ``i2am record`` calls a pipeline with: its inputs, its size, its sampler."""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image

from i2am.attribution.time_groups import too_many
from i2am.cli.errors import InputRejected
from i2am.cli.settings import FILES, Inputs, Settings
from i2am.layouts.token_layout import TokenLayout

if TYPE_CHECKING:
    from i2am.models.base import ReferencePipeline

log = logging.getLogger("i2am")

# fields of Settings and Inputs that not every pipeline takes, and what they are
_OPTIONAL = {
    "pose": "pose",
    "agnostic": "agnostic image",
    "warped": "warped garment",
    "warped_mask": "mask of a warped garment",
}


def check_model(pipe: "ReferencePipeline", settings: Settings) -> None:
    """Refuse inputs that the pipeline does not take, and missing ones that it needs.

    Warns where a model that takes a pose gets none.

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

    if pipe.takes("pose") and settings.pose is None:
        log.warning(
            "model %s takes a pose and --pose is not given: it gets an all-black one",
            settings.model,
        )


def warn_of_size(model: str, asked: tuple[int, int] | None, own: tuple[int, int]) -> None:
    """Warn of a size that the model was not made for.

    Args:
        model: What the model is called.
        asked: (height, width) that was asked for; None is the model's own.
        own: The model's own.
    """
    if asked is not None and asked != own:
        log.warning(
            "model %s was made for images of %dx%d pixels, height by width, and is asked for "
            "%dx%d: images and maps may be worse",
            model,
            *own,
            *asked,
        )


def complete(pipe: "ReferencePipeline", settings: Settings) -> Settings:
    """The settings with the numbers of the sampler, which the pipeline then has, filled in.

    What was asked for comes first, then the named sampler, then the pipeline's own defaults. More
    time groups than steps become as many, with a warning.

    Raises:
        InputRejected: The numbers do not go together.
    """
    defaults = pipe.sampling_defaults(settings.sampler)
    steps, guidance = settings.steps, settings.guidance
    steps = defaults["num_inference_steps"] if steps is None else steps
    try:
        pipe.check_steps(steps)
    except ValueError as error:
        raise InputRejected(f"steps {steps} do not suit {settings.model}: {error}") from error
    if (remark := too_many(settings.time_groups, steps)) is not None:
        log.warning("%s", remark)
    try:
        return replace(
            settings,
            steps=steps,
            guidance=defaults["guidance_scale"] if guidance is None else guidance,
            time_groups=min(settings.time_groups, steps),
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
