"""All figures of one model."""

import time
from typing import Any

from accuracy.evaluating import Measured, evaluate
from accuracy.generating import batches
from accuracy.paint import paint_test
from accuracy.pictures import swap
from accuracy.reading import ALL, join, means, standard_error
from torch import Tensor
from tqdm import tqdm

from i2am.models.custom import CustomPipeline


def score(
    pipe: CustomPipeline,
    name: str,
    *,
    split: str,
    scenes: int,
    selection_scenes: int,
    steps: int,
    guidance_scale: float,
    swap_scenes: int,
    paint_scenes: int,
    paint_steps: int,
    batch: int,
) -> dict[str, Any]:
    """Generates, reads and sums up; the values are JSON's.

    Args:
        pipe: The model.
        name: What the progress bar calls it.
        split: Split of all scenes. The first `scenes` are scored, the `selection_scenes` behind
            them choose the best layer and nothing else.
        scenes, selection_scenes, swap_scenes, paint_scenes: How many.
        steps, paint_steps: Denoising steps, and those of the paint test.
        guidance_scale: Scale of classifier-free guidance.
        batch: Scenes at a time.
    """
    start = time.perf_counter()
    pipe.set_progress_bar_config(disable=True)
    sampling = {"split": split, "steps": steps, "guidance_scale": guidance_scale}
    total = scenes + selection_scenes + swap_scenes + paint_scenes
    with tqdm(total=total, desc=name, unit="scene") as progress:
        run = {**sampling, "batch": batch, "progress": progress}
        measured = evaluate(pipe, [*range(scenes)], **run)
        choosing = [*range(scenes, scenes + selection_scenes)]
        best = evaluate(pipe, choosing, **run, pictures=False).best_layer()
        swapped = []
        for some in batches(range(swap_scenes), batch):
            swapped.append(swap(pipe, some, **sampling))
            progress.update(len(some))
        painted = paint_test(
            pipe,
            [*range(paint_scenes)],
            split=split,
            steps=paint_steps,
            guidance_scale=guidance_scale,
            batch=batch,
        )
        progress.update(paint_scenes)
    return {
        "query_cells": len(measured.true),
        "accuracy": {view: measured.accuracy(view) for view in measured.views},
        "best_layer": best,
        "scores": means(measured.scores),
        "pictures": means(measured.pictures | join(swapped)),
        "standard_errors": _errors(measured),
        "paint": _paint(painted),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _errors(measured: Measured) -> dict[str, Any]:
    return {
        "accuracy": measured.standard_errors(),
        "imacs_r": standard_error(measured.scores[f"{ALL}/imacs_r"]),
        "l1": standard_error(measured.pictures["generated/l1"]),
        "ssim": standard_error(measured.pictures["generated/ssim"]),
    }


def _paint(painted: dict[str, Tensor]) -> dict[str, Any]:
    of = means(painted)
    random = of["random"]["change_at_patch"]
    return {
        "scenes": len(painted["random/change_at_patch"]),
        **of,
        # ratios of means: a single scene's random change may be next to nothing
        "ratio_peak_to_random": of["peak"]["change_at_patch"] / random,
        "ratio_true_to_random": of["true"]["change_at_patch"] / random,
    }
