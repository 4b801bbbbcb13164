"""A training from its recipe to a pipeline on disk, in an output folder that can be resumed."""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor

from i2am.attribution.storage import write_atomically
from i2am.models.custom import CustomPipeline
from i2am.training.autoencoder import AutoencoderStage, whiten
from i2am.training.checkpoint import sync
from i2am.training.latents import cached_latents, encode
from i2am.training.loop import Intervals, optimise
from i2am.training.objective import DenoiserStage
from i2am.training.recipe import Recipe, differences
from i2am.training.scenes import FolderScenes, PaperDollScenes, SceneSource, cached_scenes
from i2am.training.start import starting_pipeline

log = logging.getLogger(__name__)
RECIPE = "recipe.json"
HELD_OUT = 32
PANELS = 8
WHITENING_BATCHES = 16


class RecipeConflict(Exception):
    """The output folder belongs to something else."""


def train(
    recipe: Recipe,
    out: Path,
    intervals: Intervals | None = None,
    *,
    workers: int = 2,
    progress: bool = True,
) -> Path | None:
    """Runs a recipe, from where an earlier run of it in `out` stopped.

    `out` gets recipe.json, autoencoder/ and denoiser/ with checkpoints and log.jsonl, cache/, and
    at the end pipeline/ in diffusers layout (with pocket.safetensors beside it for that model).

    Args:
        recipe: What to train.
        out: Output folder.
        intervals: How often checkpoints and validations are made.
        workers: Processes that render or read scenes.
        progress: Whether to show progress bars.

    Returns:
        The folder of the pipeline, None when `intervals.stop_after` came first.

    Raises:
        RecipeConflict: `out` holds another recipe, or something that is no training.
        FileNotFoundError: Part of the model or the data is missing.
        FloatingPointError: The loss is not finite.
        ValueError: Model and data do not fit.
    """
    intervals = intervals or Intervals()
    accelerator = Accelerator(
        mixed_precision=recipe.denoiser.precision,
        step_scheduler_with_optimizer=False,
        dataloader_config=DataLoaderConfiguration(),
    )
    if accelerator.is_main_process:
        _claim(out, recipe)
    accelerator.wait_for_everyone()
    final = out / "pipeline"
    if final.is_dir():
        log.info("%s is finished already", out)
        return final

    pipeline = starting_pipeline(recipe)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(accelerator.device)
    size = pipeline.configured_size
    scenes, held_out = open_scenes(recipe, size)
    show = progress and accelerator.is_main_process
    with accelerator.main_process_first():
        if recipe.autoencoder is not None:
            key = {
                "scenes": len(scenes),
                "sample": _fingerprint(scenes.read(range(min(2, len(scenes))))),
            }
            scenes = cached_scenes(scenes, out / "cache" / "scenes", key, workers, progress=show)
    held = held_out.read(range(min(HELD_OUT, len(held_out))))
    if recipe.autoencoder is not None:
        whole = _autoencoder(recipe, pipeline, accelerator, scenes, held, out, intervals, show)
        if not whole:
            return None

    key = {
        "scenes": len(scenes),
        "sample": _fingerprint(scenes.read([0])),
        "vae": _fingerprint(pipeline.vae.state_dict()),
    }
    with accelerator.main_process_first():
        latents = cached_latents(
            pipeline, scenes, out / "cache" / "latents", key=key, workers=workers, progress=show
        )
    for module in (pipeline.unet, pipeline.image_encoder, pipeline.image_proj):
        if accelerator.device.type == "cpu":
            module.to(memory_format=torch.channels_last)
    stage = DenoiserStage(
        pipeline,
        recipe.denoiser,
        latents,
        encode(pipeline, held),
        recipe.seed,
        panels=_panels(recipe, pipeline, out / "panels"),
    )
    try:
        folder = out / stage.name
        whole = optimise(stage, accelerator, folder, intervals, progress=progress)
    finally:
        stage.close()
    if not whole:
        return None
    if accelerator.is_main_process:
        pipeline.register_to_config(trained=True)
        for module in (pipeline.unet, pipeline.image_encoder, pipeline.image_proj):
            module.to(memory_format=torch.contiguous_format)
        if recipe.model == "pocket":
            from i2am.models.pocket import save_pocket_weights

            partial = out / ".pocket.safetensors.partial"
            save_pocket_weights(pipeline, partial)
            sync(partial)
            partial.replace(out / "pocket.safetensors")
        save_folder(final, pipeline.save_pretrained)
    accelerator.wait_for_everyone()
    return final


def open_scenes(recipe: Recipe, size: tuple[int, int]) -> tuple[SceneSource, SceneSource]:
    """Training and held-out scenes of a recipe.

    Args:
        recipe: Names the data.
        size: (height, width) of the model's images in pixels.

    Raises:
        FileNotFoundError: The folder, or a file in it, is missing.
        ValueError: The generator does not draw images of that size.
    """
    if recipe.data == "paper-doll":
        from i2am.data.paper_doll import SIZE

        if size != tuple(SIZE):
            raise ValueError(f"paper-doll draws images of {SIZE}, the model is made for {size}")
        assert recipe.scenes is not None
        return PaperDollScenes(recipe.scenes), PaperDollScenes(HELD_OUT, "test")
    folder = Path(recipe.data)
    return FolderScenes(folder, "train", size, recipe.scenes), FolderScenes(folder, "test", size)


def save_folder(final: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a folder that appears complete or not at all."""
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write(partial)
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(partial, final)
    sync(final.parent)


def _autoencoder(
    recipe: Recipe,
    pipeline: CustomPipeline,
    accelerator: Accelerator,
    scenes: SceneSource,
    held_out: dict[str, Tensor],
    out: Path,
    intervals: Intervals,
    progress: bool,
) -> bool:
    assert recipe.autoencoder is not None
    final = out / "autoencoder" / "final"
    if not final.is_dir():
        if accelerator.device.type == "cpu":
            pipeline.vae.to(memory_format=torch.channels_last)
        stage = AutoencoderStage(
            pipeline.vae,
            recipe.autoencoder,
            scenes,
            held_out,
            seed=recipe.seed,
            factor=pipeline.vae_scale_factor,
        )
        folder = out / stage.name
        if not optimise(stage, accelerator, folder, intervals, progress=progress):
            return False
        if accelerator.is_main_process:
            pictures = [
                scenes.read(range(16 * row, 16 * row + 16))["image"] * 2 - 1
                for row in range(min(WHITENING_BATCHES, len(scenes) // 16 or 1))
            ]
            whiten(pipeline.vae, [batch.to(pipeline.vae.device) for batch in pictures])
            # safetensors takes contiguous tensors only
            pipeline.vae.to(memory_format=torch.contiguous_format)
            save_folder(final, pipeline.vae.save_pretrained)
        accelerator.wait_for_everyone()
    # as it was saved, whether this run or an earlier one did
    vae = type(pipeline.vae).from_pretrained(final).eval().to(accelerator.device)
    pipeline.register_modules(vae=vae)
    return True


def _panels(
    recipe: Recipe, pipeline: CustomPipeline, folder: Path
) -> Callable[[int], dict[str, float]] | None:
    try:
        import torchmetrics  # noqa: F401
    except ImportError:
        log.warning("without torchmetrics there are no validation panels")
        return None
    if recipe.data == "paper-doll":
        from i2am.data.paper_doll import render

        held_out = render(range(PANELS), split="test")
    else:
        folder_scenes = FolderScenes(Path(recipe.data), "test", pipeline.configured_size)
        held_out = folder_scenes.read(range(min(PANELS, len(folder_scenes))))
    from i2am.training.validation import validate

    return lambda step: validate(pipeline, held_out, folder, step=step)


def _claim(out: Path, recipe: Recipe) -> None:
    out.mkdir(parents=True, exist_ok=True)
    path = out / RECIPE
    if not path.is_file():
        if any(out.iterdir()):
            raise RecipeConflict(f"output folder {out} is not empty and holds no {RECIPE}")
        write_atomically(path, recipe.as_json().encode())
        return
    try:
        found = Recipe.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeConflict(f"{path} cannot be read: {error}") from error
    if names := differences(found, recipe):
        raise RecipeConflict(
            f"output folder {out} holds a training with another {', '.join(names)}; "
            f"name another folder"
        )


def _fingerprint(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
