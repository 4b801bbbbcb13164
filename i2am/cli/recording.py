"""What ``i2am record`` does: check, load, estimate, run."""

import logging
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import i2am
from i2am.attribution import AttributionMaps, Box, Direction
from i2am.attribution.shown import Shown
from i2am.cli.calling import call, check_model, complete, generated_size, layout_of, warn_of_size
from i2am.cli.errors import InputRejected
from i2am.cli.estimate import Estimate, estimate
from i2am.cli.result import Result, Run, write
from i2am.cli.settings import FILES, Inputs, Settings, read_inputs
from i2am.files import check_free, fresh_folder
from i2am.layouts import AttentionCall, Frame, Sequences
from i2am.wording import counted

if TYPE_CHECKING:
    from i2am.models.base import ReferencePipeline

log = logging.getLogger("i2am")

# tqdm writes to stderr; None: no bar where that is not a terminal
_BAR: dict[str, Any] = {"desc": "steps", "disable": None}


def dry_record(settings: Settings) -> Estimate:
    """Check everything that `full_record` checks, and estimate its memory; writes nothing."""
    inputs = _check(settings)
    pipe, settings = _load(settings)
    return _estimate(_probe(pipe, settings, inputs), pipe, settings, inputs)


def full_record(settings: Settings) -> Result:
    """Run the model once under `i2am.record` and write the output folder.

    Raises:
        InputRejected: An input, the model or the memory does not do; nothing was written.
        OutputRefused: The output folder is in use.
        OSError: The disk failed; nothing was left behind.
    """
    inputs = _check(settings)
    with fresh_folder(settings.out, overwrite=settings.overwrite) as folder:
        pipe, settings = _load(settings)
        keep_keys = False
        if settings.regions or settings.preset == "official":
            probe = _probe(pipe, settings, inputs)
            _estimate(probe, pipe, settings, inputs).check()
            keep_keys = probe.keep_keys
        return write(folder, settings, inputs, _run(pipe, settings, inputs, keep_keys=keep_keys))


def _check(settings: Settings) -> Inputs:
    """Everything that can be refused without the model."""
    from i2am.models import BUILT_IN

    check_free(settings.out, overwrite=settings.overwrite)
    if settings.model not in BUILT_IN and not Path(settings.model).exists():
        raise InputRejected(
            f"model must be a built-in name ({', '.join(BUILT_IN)}) or a folder in diffusers "
            f"layout, got {settings.model!r}"
        )
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InputRejected("device cuda needs a CUDA GPU, and torch sees none")
    return read_inputs(settings)


def _load(settings: Settings) -> "tuple[ReferencePipeline, Settings]":
    """The pipeline with its sampler, and the settings with the sampler's numbers."""
    from i2am.models.loading import ModelRejected, load_offline

    try:
        # the bar of the steps is diffusers' own and stays
        verbose = log.isEnabledFor(logging.DEBUG)
        pipe = load_offline(settings.model, dtype=settings.dtype, messages=verbose)
    except ModelRejected as error:
        raise InputRejected(str(error)) from error
    check_model(pipe, settings)
    settings = complete(pipe, settings)
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe.set_progress_bar_config(**_BAR)
    return pipe.to(device), settings


@dataclass(frozen=True)
class _Probe:
    """Every layer and its grids, how many keys it has, and whether R2G is to be kept per key."""

    maps: AttributionMaps
    keys: dict[str, int]
    keep_keys: bool


def _probe(pipe: "ReferencePipeline", settings: Settings, inputs: Inputs) -> _Probe:
    """Look at one call of the denoiser."""
    layout, keys = layout_of(pipe, settings), {}

    def spans(attention: AttentionCall, frame: Frame) -> Sequences | None:
        keys[attention.layer] = attention.seqlen_k
        return layout.spans(attention, frame)

    def stop(pipe: "ReferencePipeline", *_: object) -> dict[str, Any]:
        pipe._interrupt = True
        return {}

    pipe.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with i2am.record(
            pipe,
            layout=replace(layout, spans=spans),
            time_groups=1,
            pairs=settings.report,
        ) as recorder:
            call(
                pipe,
                settings,
                inputs,
                # one step is too few for some samplers
                num_inference_steps=2,
                guidance_scale=1,
                output_type="latent",
                paste_back=False,
                callback_on_step_end=stop,
            )
        maps = recorder.maps()
    pipe.set_progress_bar_config(**_BAR)
    if settings.regions and Direction.GENERATED_TO_REFERENCE not in maps.directions:
        raise InputRejected(
            f"regions need reference patches to look at, and model {settings.model} has a single "
            "reference token"
        )
    several = not Shown(maps).single
    return _Probe(maps, keys, keep_keys=several and settings.preset == "official")


def _estimate(
    probe: _Probe, pipe: "ReferencePipeline", settings: Settings, inputs: Inputs
) -> Estimate:
    height, width = generated_size(pipe, settings, inputs)
    given = [getattr(inputs, name) for name in FILES]
    return estimate(
        probe.maps,
        time_groups=settings.time_groups,
        votes=1 + (inputs.reference_mask is not None),
        rows=2 + len(settings.regions),
        keys=probe.keys if probe.keep_keys else None,
        branches=2 if settings.guidance_branch == "both" else 1,
        guided=(settings.guidance or 0) > 1,
        pixels=height * width + sum(image.width * image.height for image in given if image),
        device=pipe.device,
    )


def _run(pipe: "ReferencePipeline", settings: Settings, inputs: Inputs, *, keep_keys: bool) -> Run:
    height, width = generated_size(pipe, settings, inputs)
    if not pipe.trained:
        log.warning(
            "the weights of %s are random, not trained: image and maps show how the recorder works "
            "and mean nothing",
            settings.model,
        )
    own = pipe.default_output_size(inputs.person)
    warn_of_size(settings.model, settings.size, own)
    rows, columns = settings.size or own
    stretch = (columns / rows) / (inputs.person.width / inputs.person.height)
    # a rounded side is not a stretch
    if abs(stretch - 1) > 0.01 + 1 / min(rows, columns):
        log.warning(
            "the person, %d x %d pixels, is stretched to the generated %d x %d",
            inputs.person.width,
            inputs.person.height,
            columns,
            rows,
        )
    size = (inputs.person.height, inputs.person.width)
    regions = {
        box.name: Box(box.top, box.left, box.height, box.width, size) for box in settings.regions
    }
    steps = counted(settings.steps or 0, "step")
    log.info("recording %s, %d pixels wide and %d high", steps, width, height)
    started = time.monotonic()
    with i2am.record(
        pipe,
        layout=layout_of(pipe, settings),
        time_groups=settings.time_groups,
        branch=settings.guidance_branch,
        regions=regions,
        mask=inputs.mask,
        reference_mask=inputs.reference_mask,
        keep_keys=keep_keys,
        pairs=settings.report,
    ) as recorder:
        (image,) = call(pipe, settings, inputs)
    if settings.guidance_branch == "both":
        maps = {name: recorder.maps(name) for name in ("conditional", "unconditional")}
    else:
        maps = {settings.guidance_branch: recorder.maps()}
    return Run(
        image=image,
        maps={name: branch.to("cpu") for name, branch in maps.items()},
        trained=pipe.trained,
        pipeline=type(pipe).__name__,
        scheduler=type(pipe.scheduler).__name__,
        device=str(pipe.device),
        seconds=time.monotonic() - started,
    )
