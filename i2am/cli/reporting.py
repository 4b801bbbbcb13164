"""Samples of a report, read from the folders of ``i2am record`` and ``i2am evaluate``."""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from i2am.attribution import AttributionMaps
from i2am.cli.errors import InputRejected
from i2am.cli.recorded import halves, read_manifest, read_run, read_scores
from i2am.cli.runs import open_run
from i2am.data.images import ImageRejected, read_bytes, read_image, read_mask
from i2am.evaluation.errors import StoreDamaged
from i2am.evaluation.plan_file import RUN_LIMIT
from i2am.files import MANIFEST, FileRejected, read_json
from i2am.metrics.names import IMACS_NAMES
from i2am.plots.titles import step_titles
from i2am.viewer import Sample, Source, Stack, sample
from i2am.wording import counted

if TYPE_CHECKING:
    from PIL.Image import Image

    from i2am.data.vitonhd import VitonHD
    from i2am.evaluation.shard import Shard
    from i2am.evaluation.store import Store

log = logging.getLogger("i2am")

_KINDS = {
    "share_mask": "share",
    "r2g_uniform": "r2g",
    "r2g_mask": "r2g_mask",
    "g2r_uniform": "g2r",
    "g2r_mask": "g2r_mask",
}
"""Maps of a shard, and what a page calls them."""


@dataclass
class Wanted:
    """What a report is made of.

    Attributes:
        runs: Folders of ``i2am record`` and ``i2am evaluate``.
        setting: Of evaluations this setting only, "paired" or "unpaired".
        limit: At most so many samples of each run and setting.
        data: Data set of an evaluation, where it is not where it was.
        left_out: Filled while samples are read: why a sample is not shown, by id.
    """

    runs: tuple[Path, ...]
    setting: str | None = None
    limit: int | None = None
    data: Path | None = None
    left_out: dict[str, str] = field(default_factory=dict)


def samples_of(wanted: Wanted) -> Iterator[Sample]:
    """Every sample of the runs, read when it is its turn.

    Raises:
        InputRejected: A folder is neither, its files are damaged or gone, or nothing can be shown.
        RunUnusable: The folder of an evaluation is damaged.
        OSError: The disk failed.
    """
    shown = 0
    names = [folder.resolve().name for folder in wanted.runs]
    for folder, name in zip(wanted.runs, names, strict=True):
        # runs of one name are told apart by their folders
        prefix = name if names.count(name) == 1 else str(folder)
        if _is_run(folder):
            found = _evaluated(folder, wanted, prefix)
        else:
            found = recorded_samples(folder, prefix)
        for one in found:
            shown += 1
            yield one
    if not shown:
        reasons = list(wanted.left_out.values()) or ["no shard is committed yet"]
        raise InputRejected(f"run {wanted.runs[0]} has no sample that can be shown: {reasons[0]}")


def _is_run(folder: Path) -> bool:
    try:
        manifest = read_json(folder / MANIFEST, limit=RUN_LIMIT)
    except (OSError, FileRejected):
        # said better where it is read again
        return False
    return isinstance(manifest, dict) and "fingerprint" in manifest


# i2am record


def recorded_samples(folder: Path, name: str) -> Iterator[Sample]:
    """The sample of an output folder of ``i2am record``, or two: one per half of guidance.

    Args:
        folder: The folder.
        name: What the sample is called.

    Raises:
        InputRejected: It is no such folder, its files are damaged or gone, or its maps hold NaN.
        OSError: The disk failed.
    """
    runs = {branch: read_run(folder, branch=branch) for branch in halves(read_manifest(folder))}
    run = next(iter(runs.values()))
    manifest, notes = run.manifest, [*map(str, run.manifest["notes"])]
    inputs = manifest["inputs"]
    mask, reference_mask = (
        _mask(folder, inputs.get(kind), kind, notes) for kind in ("mask", "reference_mask")
    )
    try:
        yield from shown_samples(
            {**manifest, "notes": notes},
            {branch: of.maps for branch, of in runs.items()},
            name=name,
            scores=read_scores(folder, manifest),
            generated=run.generated,
            reference=run.reference,
            mask=mask,
            reference_mask=reference_mask,
        )
    except ValueError as error:
        raise InputRejected(f"run {folder} cannot be shown: {error}") from error


def shown_samples(
    manifest: Mapping[str, Any],
    maps: Mapping[str, AttributionMaps],
    *,
    name: str,
    scores: Mapping[str, Any],
    generated: "Image",
    reference: "Image",
    mask: "Image | None",
    reference_mask: "Image | None",
) -> Iterator[Sample]:
    """What pages show of a recording: a sample, or one per half of guidance.

    Args:
        manifest: Content of its ``run.json``.
        maps: Of each recorded half of guidance.
        name: What the sample is called.
        scores: Content of its ``scores.json``.
        generated: The image that was made.
        reference: The image it was made after.
        mask: Inpainting mask.
        reference_mask: Mask of the object in the reference.

    Raises:
        ValueError: The maps hold NaN.
    """
    settings, image = manifest["settings"], manifest["image"]
    guided = settings["guidance"] > 1
    for number, (branch, of) in enumerate(maps.items()):
        suffix = f"_{branch}" if number else ""
        facts = {
            # a path or a built-in name
            "Model": Path(str(settings["model"])).name,
            "Scheduler": f"{manifest['model']['scheduler']}, {counted(settings['steps'], 'step')}",
            "Guidance": f"{settings['guidance']:g}, {branch} half recorded" if guided else "none",
            "Seed": str(settings["seed"]),
            "Size": f"{image['width']} \N{MULTIPLICATION SIGN} {image['height']} pixels",
            "Preset": settings["preset"],
            "Device": f"{manifest['device']}, {settings['dtype']}",
            "i2am": manifest["i2am"],
        }
        yield sample(
            of,
            generated=generated,
            reference=reference,
            id=name if len(maps) == 1 else f"{name}, {branch}",
            scores={
                kind: scores[f"{kind}{suffix}"]
                for kind in IMACS_NAMES
                if f"{kind}{suffix}" in scores
            },
            truths={
                region["name"]: region["truth"]
                for region in settings["regions"]
                if region.get("truth")
            },
            facts=facts,
            notes=manifest["notes"],
            preset=settings["preset"],
            mask=mask,
            reference_mask=reference_mask,
        )


def _mask(
    folder: Path, entry: Mapping[str, Any] | None, name: str, notes: list[str]
) -> "Image | None":
    """A mask is an outline only: a page without it is no less true, if it says so."""
    if entry is None:
        return None
    path = folder / str(entry["file"])
    try:
        content = read_bytes(path, name=name)
        if sha256(content).hexdigest() == entry["sha256"]:
            return read_mask(path, name=name, content=content)
        problem = f"{name} {path.name} has changed since"
    except ImageRejected:
        problem = f"{name} {path.name} is not there any more"
    log.warning("%s: %s, so its outline is left out", folder, problem)
    notes.append(f"The {problem}: its outline is left out.")
    return None


# i2am evaluate


def _evaluated(folder: Path, wanted: Wanted, name: str) -> Iterator[Sample]:
    with open_run(folder) as store:
        for setting in store.settings():
            if wanted.setting in (None, setting):
                yield from islice(_of_setting(store, setting, wanted, name), wanted.limit)


def _of_setting(store: "Store", setting: str, wanted: Wanted, name: str) -> Iterator[Sample]:
    data = _data(store, setting, wanted)
    places = {pair.id: index for index, pair in enumerate(data.pairs)}
    for shard in store.shards(setting, tensors=None):
        for at, id in enumerate(shard.ids):
            title = f"{setting}/{id}" if len(wanted.runs) == 1 else f"{name}/{setting}/{id}"
            reason = _failure(shard, id, at)
            if reason is None and id not in places:
                reason = f"it is not in the data set {data.setting}"
            if reason is None:
                try:
                    one = _evaluated_sample(store, shard, at, data, places[id], title)
                except (StoreDamaged, ValueError) as error:
                    reason = str(error)
                else:
                    yield one
                    continue
            wanted.left_out[title] = reason


def _data(store: "Store", setting: str, wanted: Wanted) -> "VitonHD":
    from i2am.data.vitonhd import Setting, VitonHD

    plan = store.plan
    folder = wanted.data or Path(plan["data"]["folder"])
    pairs: Setting = "paired" if setting == "paired" else "unpaired"
    try:
        height, width = plan["settings"]["size"]
        return VitonHD(folder, plan["data"]["split"], (height, width), pairs=pairs, missing="keep")
    except (ValueError, FileNotFoundError) as error:
        raise InputRejected(
            f"data set {folder} of run {store.folder} cannot be read, name it with --data: {error}"
        ) from error


def _failure(shard: "Shard", id: str, at: int) -> str | None:
    from i2am.evaluation.shard import OK, SAMPLE

    if int(shard.status[at]) == OK:
        return None
    reason = shard.reasons.get(id, {}).get(SAMPLE)
    return reason.message if reason else "it failed"


def _evaluated_sample(
    store: "Store", shard: "Shard", at: int, data: "VitonHD", index: int, title: str
) -> Sample:
    plan, id = store.plan, shard.ids[at]
    settings = plan["settings"]
    stacks = [
        _stack(page_name, shard.maps[name][at], shard.maps[f"{name}_scale"][at])
        for name, page_name in _KINDS.items()
        if name in shard.maps
    ]
    # [slices, queries, height, width]
    groups, heads = (
        shard.maps[next(name for name in _KINDS if name in shard.maps)].shape[1:3]
        if stacks
        else (0, 0)
    )
    steps, guidance = settings["steps"], settings["guidance"]
    garment = read_image(data.path("garment", index), name="reference")
    return Sample(
        id=title,
        generated=read_image(
            store.image_path(shard.setting, id),
            name="generated image",
            content=store.image(shard, id),
        ),
        sources=[Source(garment, _outlined(data.path("garment_mask", index)))],
        stacks=stacks,
        times=step_titles(groups, steps),
        heads=[f"head {head}" for head in range(heads)],
        mask=_outlined(data.path("mask", index)),
        scores=_shard_scores(shard, at),
        facts={
            "Model": Path(str(plan["model"]["name"])).name,
            "Setting": shard.setting,
            "Steps": str(steps),
            "Guidance": f"{guidance:g}",
            "Seed": str(settings["seed"]),
            "Preset": settings["preset"],
            "Maps": "none kept" if not stacks else f"{settings['maps']}, averaged over layers",
            "i2am": plan["i2am"],
        },
        notes=[] if plan["model"].get("trained", True) else ["the weights are random, not trained"],
    )


def _outlined(path: Path) -> "Image | None":
    try:
        return read_mask(path, name="mask")
    except ImageRejected:
        # gone, or all of one colour: there is nothing to outline
        return None


def _stack(name: str, maps: Tensor, scale: Tensor) -> Stack:
    """All of ``[time groups, heads, height, width]`` together, then per time group and per head."""
    sums = maps.float() * scale[:, :, None, None]
    parts = [sums.sum(0).mean(0, keepdim=True), sums.mean(1), sums.sum(0)]
    slices = [
        "all",
        *(f"t{n}" for n in range(sums.shape[0])),
        *(f"h{n}" for n in range(len(sums[0]))),
    ]
    return Stack(name, torch.cat(parts)[:, None], tuple(slices))


def _shard_scores(shard: "Shard", at: int) -> dict[str, dict[str, Any]]:
    reasons = shard.reasons.get(shard.ids[at], {})
    scores = {}
    for name, value in zip(shard.score_names, shard.scores[at].tolist(), strict=True):
        undefined = math.isnan(value)
        scores[name] = {
            "value": None if undefined else value,
            "reason": reasons[name].message if undefined else None,
        }
    return scores
