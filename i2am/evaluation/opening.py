"""From names to the parts of a run: the model on its device, the data, the settings, a worker."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from i2am.attribution.time_groups import too_many
from i2am.data.vitonhd import VitonHD
from i2am.evaluation.generating import first_whole
from i2am.evaluation.plan import Settings, digest_of, make_plan
from i2am.evaluation.store import Store
from i2am.evaluation.worker import Worker
from i2am.models.loading import load_offline

if TYPE_CHECKING:
    from i2am.models.base import ReferencePipeline

log = logging.getLogger("i2am")


@dataclass(frozen=True)
class Sources:
    """Where a process finds what a run is made from; none of it decides what comes out.

    Args:
        model: A built-in name, or a folder in diffusers layout.
        data: Folder in the layout of VITON-HD.
        split: Its ``"train"`` or ``"test"``.
        missing: As for `VitonHD`.
    """

    model: str
    data: Path
    split: str = "test"
    missing: Literal["raise", "keep"] = "raise"


@dataclass(frozen=True)
class Opened:
    """A model, its data and how it is run; the plan of all that."""

    pipe: "ReferencePipeline"
    data: Mapping[str, VitonHD]
    settings: Settings
    plan: dict[str, Any]


def open_run(sources: Sources, options: Mapping[str, Any], *, contents: bool = False) -> Opened:
    """Loads a model, checks the data set and settles how the one is run over the other.

    Args:
        sources: Where they are.
        options: Fields of `Settings` that were asked for; those that are missing or None come from
            the sampler, the model and the defaults: a batch of at most the shard, a shard of at
            least the batch. More time groups than steps become as many, with a warning.
        contents: Whether the data set's contents count in the fingerprint, not their sizes alone.

    Raises:
        ModelRejected: The model cannot be loaded, or does not suit the data or the settings.
        DataRejected: The data set lacks something; it has all problems.
        ImageRejected: None of the first pairs can be read.
        ValueError: A setting is out of its range.
        FileNotFoundError: There is no data set.
    """
    asked = {name: value for name, value in options.items() if value is not None}
    dtype, device = asked.get("dtype", "float32"), asked.get("device", "cpu")
    pipe = load_offline(sources.model, dtype=dtype)
    sampling = pipe.sampling_defaults(asked.get("sampler"))
    asked = {
        "steps": sampling["num_inference_steps"],
        "guidance": sampling["guidance_scale"],
        "eta": sampling.get("eta", 0.0),
        "threads": torch.get_num_threads(),
        **asked,
    }
    if "size" not in asked:
        asked["size"] = default_size(pipe)
    batch, shard = (asked.get(name, getattr(Settings, name)) for name in ("batch", "shard"))
    if batch > shard:
        # what was not asked for gives way
        asked = {"batch": shard, "shard": batch, **asked}
    groups = asked.get("time_groups", Settings.time_groups)
    if (remark := too_many(groups, asked["steps"])) is not None:
        log.warning("%s", remark)
        asked["time_groups"] = asked["steps"]
    settings = Settings(**asked)
    pipe.size_arguments(settings.size)
    pipe.check_steps(settings.steps)
    data = _open_data(pipe, sources, settings)
    for pairs in data.values():
        first_whole(pairs)
    _prepare(pipe, settings)
    plan = make_plan(
        pipe,
        data,
        settings,
        model=sources.model,
        folder=sources.data,
        weights_sha256=digest_of(sources.model),
        contents=contents,
    )
    return Opened(pipe.to(device) if settings.offload == "none" else pipe, data, settings, plan)


def open_worker(store: Store, sources: Sources, device: str) -> Worker:
    """A worker for a run that is planned already, on a machine of its own.

    Args:
        store: The run.
        sources: Where its model and data are, seen from here.
        device: What to compute on, ``"cuda:1"`` for example.

    Raises:
        ModelRejected, DataRejected, ValueError, FileNotFoundError: As `open_run`.
    """
    settings = settings_of(store.plan)
    pipe = load_offline(sources.model, dtype=settings.dtype)
    pipe.sampling_defaults(settings.sampler)
    data = _open_data(pipe, sources, settings)
    _prepare(pipe, settings)
    return Worker(store, pipe.to(device) if settings.offload == "none" else pipe, data, settings)


def settings_of(plan: Mapping[str, Any]) -> Settings:
    """The settings in a plan."""
    stored = plan["settings"]
    lists = {name: tuple(value) for name, value in stored.items() if isinstance(value, list)}
    return Settings(**{**stored, **lists})


def stored_options(plan: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options to go on with a run: what is asked for now, and else what its plan says.

    Args:
        plan: Of the run that is there.
        options: Fields of `Settings`; None where nothing was asked for.
    """
    stored = settings_of(plan)
    return {
        field.name: getattr(stored, field.name)
        if options.get(field.name) is None
        else options[field.name]
        for field in fields(Settings)
    }


def with_batch(opened: Opened, batch: int, sources: Sources, *, contents: bool) -> Opened:
    """The same with another batch, in the plan too."""
    settings = replace(opened.settings, batch=batch, shard=max(batch, opened.settings.shard))
    plan = make_plan(
        opened.pipe,
        opened.data,
        settings,
        model=sources.model,
        folder=sources.data,
        weights_sha256=opened.plan["model"]["weights_sha256"],
        contents=contents,
    )
    return replace(opened, settings=settings, plan=plan)


def default_size(pipe: "ReferencePipeline") -> tuple[int, int]:
    """(height, width) of the images that a model makes of a person of VITON-HD."""
    from PIL import Image

    return pipe.default_output_size(Image.new("RGB", (768, 1024)))


def _open_data(
    pipe: "ReferencePipeline", sources: Sources, settings: Settings
) -> dict[str, VitonHD]:
    from i2am.models.loading import ModelRejected

    data: dict[str, VitonHD] = {
        name: VitonHD(
            sources.data,
            sources.split,
            settings.size,
            pairs=name,
            warps=pipe.requires("warped"),
            missing=sources.missing,
            stretch=settings.stretch,
        )
        for name in settings.pairs
    }
    if pipe.requires("pose") and "pose" not in data[settings.pairs[0]].names:
        raise ModelRejected(
            f"model {sources.model} needs poses, and {sources.data} has no folder image-densepose"
        )
    return data


def _prepare(pipe: "ReferencePipeline", settings: Settings) -> None:
    from i2am.models.loading import ModelRejected

    for asked, method in (
        (settings.vae_slicing, "enable_slicing"),
        (settings.vae_tiling, "enable_tiling"),
    ):
        if asked:
            if not hasattr(pipe.vae, method):
                option = method.replace("enable_", "--vae-")
                name = type(pipe.vae).__name__
                raise ModelRejected(f"the autoencoder {name} cannot do {option}, leave it out")
            getattr(pipe.vae, method)()
    if settings.offload == "model":
        pipe.enable_model_cpu_offload()
    elif settings.offload == "sequential":
        pipe.enable_sequential_cpu_offload()
