"""What ``i2am record`` does: check, load, estimate, run."""

import logging
import os
import time
import warnings
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image

import i2am
from i2am.attribution import AttributionMaps, Direction
from i2am.cli.errors import InputRejected
from i2am.cli.estimate import Estimate, estimate
from i2am.cli.folder import check_free, fresh_folder
from i2am.cli.result import Result, Run, write
from i2am.cli.settings import Inputs, Settings, box_weights, mask_weights, read_inputs

if TYPE_CHECKING:
    from i2am.models.base import ReferencePipeline

log = logging.getLogger("i2am")

# tqdm writes to stderr; None: no bar where that is not a terminal
_BAR: dict[str, Any] = {"desc": "steps", "disable": None}


def dry_record(settings: Settings) -> Estimate:
    """Check everything that `full_record` checks, and estimate its memory; writes nothing."""
    inputs = _check(settings)
    pipe = _load(settings)
    return _estimate(_probe(pipe, settings, inputs), pipe, settings, inputs)


def full_record(settings: Settings) -> Result:
    """Run the model once under `i2am.record` and write the output folder.

    Raises:
        InputRejected: An input, the model or the memory does not do; nothing was written.
        OutputConflict: The output folder is in use.
        OSError: The disk failed; nothing was left behind.
    """
    inputs = _check(settings)
    with fresh_folder(settings.out, overwrite=settings.overwrite) as folder:
        pipe = _load(settings)
        if settings.regions:
            _estimate(_probe(pipe, settings, inputs), pipe, settings, inputs).check()
        return write(folder, settings, inputs, _run(pipe, settings, inputs))


def _check(settings: Settings) -> Inputs:
    """Everything that can be refused without the model."""
    from i2am.models import BUILT_IN

    settings.check()
    check_free(settings.out, overwrite=settings.overwrite)
    if settings.model not in BUILT_IN and not Path(settings.model).exists():
        raise InputRejected(
            f"model must be a built-in name ({', '.join(BUILT_IN)}) or a folder in diffusers "
            f"layout, got {settings.model!r}"
        )
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InputRejected("device cuda needs a CUDA GPU, and torch sees none")
    return read_inputs(settings)


def _load(settings: Settings) -> "ReferencePipeline":
    # read when diffusers is imported: whatever a folder says, no hub is asked
    os.environ["HF_HUB_OFFLINE"] = "1"
    import diffusers
    import transformers

    from i2am.models import load_pipeline

    if not log.isEnabledFor(logging.DEBUG):
        # the bar of the steps is diffusers' own and stays
        diffusers.utils.logging.set_verbosity_error()
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    log.debug("loading %s", settings.model)
    dtype = None if settings.dtype == "float32" else getattr(torch, settings.dtype)
    try:
        pipe = load_pipeline(settings.model, torch_dtype=dtype)
    except (FileNotFoundError, ValueError) as error:
        raise InputRejected(f"model {settings.model} cannot be loaded: {error}") from error
    if settings.pose and "pose_image" not in signature(type(pipe).__call__).parameters:
        raise InputRejected(f"model {settings.model} takes no pose, leave --pose out")
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe.set_progress_bar_config(**_BAR)
    return pipe.to(device)


def _size(pipe: "ReferencePipeline", settings: Settings, inputs: Inputs) -> tuple[int, int]:
    height, width = settings.size or pipe.default_size(inputs.person)
    try:
        return pipe.check_size(height, width)
    except ValueError as error:
        raise InputRejected(
            f"size {height}x{width} does not suit {settings.model}: {error}"
        ) from error


def _call(
    pipe: "ReferencePipeline", settings: Settings, inputs: Inputs, **changes: Any
) -> list[Image]:
    height, width = _size(pipe, settings, inputs)
    arguments = {
        "image": inputs.person,
        "mask_image": inputs.mask,
        "reference_image": inputs.reference,
        "height": height,
        "width": width,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
        "generator": torch.Generator().manual_seed(settings.seed),
    }
    if inputs.pose is not None:
        arguments["pose_image"] = inputs.pose
    return pipe(**{**arguments, **changes}).images


def _probe(pipe: "ReferencePipeline", settings: Settings, inputs: Inputs) -> AttributionMaps:
    """Every layer and its grids, from a run that is as short as can be."""
    pipe.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # one step is too few for some samplers
        with i2am.record(pipe, time_groups=1) as recorder:
            _call(
                pipe,
                settings,
                inputs,
                num_inference_steps=2,
                guidance_scale=1,
                output_type="latent",
            )
        probe = recorder.maps()
    pipe.set_progress_bar_config(**_BAR)
    if settings.regions and Direction.GENERATED_TO_REFERENCE not in probe.directions:
        raise InputRejected(
            f"regions need reference patches to look at, and model {settings.model} has a single "
            "reference token"
        )
    return probe


def _estimate(
    probe: AttributionMaps, pipe: "ReferencePipeline", settings: Settings, inputs: Inputs
) -> Estimate:
    height, width = _size(pipe, settings, inputs)
    given = [inputs.person, inputs.mask, inputs.reference, inputs.pose, inputs.reference_mask]
    return estimate(
        probe,
        time_groups=settings.time_groups,
        votes=1 + (inputs.reference_mask is not None),
        rows=2 + len(settings.regions),
        branches=2 if settings.guidance_branch == "both" else 1,
        guided=settings.guidance > 1,
        pixels=height * width + sum(image.width * image.height for image in given if image),
        device=pipe.device,
    )


def _run(pipe: "ReferencePipeline", settings: Settings, inputs: Inputs) -> Run:
    height, width = _size(pipe, settings, inputs)
    trained = getattr(pipe, "trained", True)
    if not trained:
        log.warning(
            "the weights of %s are random, not trained: image and maps show how the recorder works "
            "and mean nothing",
            settings.model,
        )
    stretch = (width / height) / (inputs.person.width / inputs.person.height)
    if abs(stretch - 1) > 0.01:
        log.warning(
            "the person, %d x %d pixels, is stretched to the generated %d x %d",
            inputs.person.width,
            inputs.person.height,
            width,
            height,
        )
    layout = replace(pipe.attribution_layout(), prefix_votes=settings.preset == "official")
    reference_mask = inputs.reference_mask
    log.info("recording %d steps, %d pixels wide and %d high", settings.steps, width, height)
    started = time.monotonic()
    with i2am.record(
        pipe,
        layout=layout,
        time_groups=settings.time_groups,
        guidance=settings.guidance_branch,
        regions={box.name: box_weights(box, inputs.person) for box in settings.regions},
        mask=mask_weights(inputs.mask),
        reference_mask=None if reference_mask is None else mask_weights(reference_mask),
    ) as recorder:
        (image,) = _call(pipe, settings, inputs)
    if settings.guidance_branch == "both":
        maps = {name: recorder.maps(name) for name in ("conditional", "unconditional")}
    else:
        maps = {settings.guidance_branch: recorder.maps()}
    return Run(
        image=image,
        maps={name: branch.to("cpu") for name, branch in maps.items()},
        trained=trained,
        pipeline=type(pipe).__name__,
        device=str(pipe.device),
        seconds=time.monotonic() - started,
    )
