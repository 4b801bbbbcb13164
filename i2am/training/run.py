"""A training from its recipe to a pipeline on disk, in an output folder that can be resumed."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from i2am.files import (
    FolderLock,
    OutputRefused,
    check_place,
    make_folder,
    publish,
    read_bytes,
    refuse_links,
    replaced_folder,
)
from i2am.files.atomic import is_temporary
from i2am.files.json_files import LIMIT
from i2am.models.custom import CustomPipeline
from i2am.training.autoencoder import AutoencoderStage, whiten
from i2am.training.latents import cached_latents, encode
from i2am.training.loop import Intervals, Stage, optimise
from i2am.training.objective import DenoiserStage
from i2am.training.recipe import Recipe, differences
from i2am.training.scenes import (
    CachedScenes,
    FolderScenes,
    PaperDollScenes,
    SceneSource,
    cached_scenes,
    fingerprint,
)
from i2am.training.start import starting_pipeline

log = logging.getLogger(__name__)
RECIPE = "recipe.json"
HELD_OUT = 32
PANELS = 8
WHITENING_SCENES = 256


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
        OutputRefused: `out` holds another recipe, or something that is no training.
        FileNotFoundError: Part of the model or the data is missing.
        FloatingPointError: The loss is not finite.
        ValueError: Model and data do not fit.
    """
    intervals = intervals or Intervals()
    check_place(out, kind="folder")
    accelerator = Accelerator(mixed_precision=recipe.denoiser.precision)
    pipeline = starting_pipeline(recipe)
    scenes = open_scenes(recipe, pipeline.configured_size)
    # after everything that may be refused: a wrong input leaves nothing behind
    _lock = _claim(out, recipe) if accelerator.is_main_process else None
    accelerator.wait_for_everyone()
    final = out / "pipeline"
    if final.is_dir():
        log.info("%s is finished already", out)
        return final
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(accelerator.device)
    show = progress and accelerator.is_main_process
    run = _Run(recipe, out, intervals, accelerator, workers=workers, progress=show)
    if not run.train(pipeline, *scenes):
        return None
    if accelerator.is_main_process:
        _save(pipeline, recipe, out)
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


class _Run:
    """What both stages are done with."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        intervals: Intervals,
        accelerator: Accelerator,
        *,
        workers: int,
        progress: bool,
    ) -> None:
        self.recipe, self.out, self.intervals = recipe, out, intervals
        self.accelerator, self.workers, self.progress = accelerator, workers, progress

    def train(
        self, pipeline: CustomPipeline, scenes: SceneSource, test_scenes: SceneSource
    ) -> bool:
        """Trains `pipeline` in place; False when it was left unfinished."""
        held_out = test_scenes.read(range(min(HELD_OUT, len(test_scenes))))
        if self.recipe.autoencoder is not None:
            first = range(min(2, len(scenes)))
            key = {"scenes": len(scenes), "sample": fingerprint(scenes.read(first))}
            folder = self.out / "cache" / "scenes"
            with self.accelerator.main_process_first():
                scenes = cached_scenes(scenes, folder, key, self.workers, progress=self.progress)
            if not self._autoencoder(pipeline, scenes, held_out):
                return False
        return self._denoiser(pipeline, scenes, held_out)

    def _autoencoder(
        self, pipeline: CustomPipeline, scenes: CachedScenes, held_out: dict[str, Tensor]
    ) -> bool:
        recipe, accelerator = self.recipe.autoencoder, self.accelerator
        assert recipe is not None
        final = self.out / "autoencoder" / "final"
        if not final.is_dir():
            vae, seed = pipeline.vae, self.recipe.seed
            self._arrange(vae, training=True)
            factor = pipeline.vae_scale_factor
            stage = AutoencoderStage(vae, recipe, scenes, held_out, seed=seed, factor=factor)
            if not self._optimise(stage):
                return False
            if accelerator.is_main_process:
                batches = torch.arange(min(WHITENING_SCENES, len(scenes))).split(16)
                pictures = [scenes.read(batch.tolist(), ["image"])["image"] for batch in batches]
                whiten(vae, [batch.to(vae.device) * 2 - 1 for batch in pictures])
                self._arrange(vae, training=False)
                with replaced_folder(final) as folder:
                    vae.save_pretrained(folder)
            accelerator.wait_for_everyone()
        # as it was saved, whether this run or an earlier one did
        vae = type(pipeline.vae).from_pretrained(final).eval().to(accelerator.device)
        pipeline.register_modules(vae=vae)
        return True

    def _denoiser(
        self, pipeline: CustomPipeline, scenes: SceneSource, held_out: dict[str, Tensor]
    ) -> bool:
        key = {
            "scenes": len(scenes),
            "sample": fingerprint(scenes.read([0])),
            "vae": fingerprint(pipeline.vae.state_dict()),
        }
        folder, workers = self.out / "cache" / "latents", self.workers
        with self.accelerator.main_process_first():
            latents = cached_latents(
                pipeline, scenes, folder, key=key, workers=workers, progress=self.progress
            )
        panels = _panels(self.recipe, pipeline, self.out / "panels")
        encoded, seed = encode(pipeline, held_out), self.recipe.seed
        stage = DenoiserStage(pipeline, self.recipe.denoiser, latents, encoded, seed, panels)
        self._arrange(stage.module, training=True)
        try:
            whole = self._optimise(stage)
        finally:
            stage.close()
        self._arrange(stage.module, training=False)
        return whole

    def _optimise(self, stage: Stage) -> bool:
        folder = self.out / stage.name
        return optimise(stage, self.accelerator, folder, self.intervals, progress=self.progress)

    def _arrange(self, module: nn.Module, *, training: bool) -> None:
        # faster convolutions on a CPU; safetensors takes contiguous tensors only
        if self.accelerator.device.type == "cpu":
            layout = torch.channels_last if training else torch.contiguous_format
            module.to(memory_format=layout)  # type: ignore[call-overload]


def _save(pipeline: CustomPipeline, recipe: Recipe, out: Path) -> None:
    pipeline.register_to_config(trained=True)
    if recipe.model == "pocket":
        from i2am.models.pocket import save_pocket_weights

        save_pocket_weights(pipeline, out / "pocket.safetensors")
    with replaced_folder(out / "pipeline") as folder:
        pipeline.save_pretrained(folder)


def _panels(
    recipe: Recipe, pipeline: CustomPipeline, folder: Path
) -> Callable[[int], dict[str, float]] | None:
    try:
        import torchmetrics  # noqa: F401
    # a torchvision that does not fit torch breaks the import with a RuntimeError
    except (ImportError, RuntimeError):
        log.warning("without torchmetrics there are no validation panels")
        return None
    if recipe.data == "paper-doll":
        from i2am.data.paper_doll import render

        held_out = render(range(PANELS), split="test")._asdict()
    else:
        folder_scenes = FolderScenes(Path(recipe.data), "test", pipeline.configured_size)
        held_out = folder_scenes.read(range(min(PANELS, len(folder_scenes))))
    from i2am.training.validation import validate

    return lambda step: validate(pipeline, held_out, folder, step=step)


def _claim(out: Path, recipe: Recipe) -> FolderLock:
    """Make the folder this training's, and remove what a killed one left; held until it ends."""
    make_folder(out)
    refuse_links(out)
    path = out / RECIPE
    if not path.exists():
        if any(not is_temporary(name) for name in os.listdir(out)):
            raise OutputRefused(f"output folder {out} is not empty and holds no {RECIPE}")
        publish(path, recipe.as_json().encode())
    try:
        found = Recipe.from_json(read_bytes(path, limit=LIMIT))
    except ValueError as error:
        raise OutputRefused(f"{path} cannot be read: {error}") from error
    if names := differences(found, recipe):
        raise OutputRefused(
            f"output folder {out} holds a training with another {', '.join(names)}; "
            f"name another folder"
        )
    return FolderLock(path, clean=[*(inner for inner in out.iterdir() if inner.is_dir()), out])
