"""Held-out scenes during training: a picture to look at, and how near it and the maps come."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from i2am.adapters import record
from i2am.attribution.grid import Patch, resize
from i2am.files import make_folder, write
from i2am.metrics.pck import pck, peak
from i2am.metrics.pictures import masked_l1, masked_ssim
from i2am.models.custom import CustomPipeline

if TYPE_CHECKING:
    from i2am.data.paper_doll import Scenes

QUERY_GRID = (16, 12)
"""(rows, columns) over the generated image whose cells ask for their place on the garment."""
PANEL_ROWS = 8
"""Most scenes that a panel shows; the figures are of all."""

_NEEDED = ("image", "garment", "agnostic", "pose")
_COLUMNS = {"garment": "garment", "agnostic": "agnostic", "generated": "generated", "image": "true"}
_BATCH = 8
_TILE = 256  # small pictures are shown about this high


@torch.no_grad()
def validate(
    pipeline: CustomPipeline,
    scenes: "Scenes | Mapping[str, Tensor]",
    folder: Path,
    *,
    step: int,
    inference_steps: int = 10,
    guidance_scale: float = 2.0,
    seed: int = 0,
) -> dict[str, float]:
    """Generates scenes with the model as it is now, writes a panel of them and scores them.

    The noise of scene i comes from a generator of its own seeded with ``seed + i``, whatever the
    batch; the VAE's posterior is taken at its mode. The model is evaluated in evaluation mode;
    afterwards its modes, its scheduler and all random states are as they were.

    Args:
        pipeline: The model in training.
        scenes: A batch of drawn scenes, or the fields of `Scenes` that a data set has.
            ``image``, ``garment``, ``agnostic`` and ``pose`` must be there. Another field that is
            missing only takes the figures with it that need it. The garment may have any size.
        folder: Gets ``panel-00001500.png`` for step 1500, made if need be; every row shows a
            garment, the agnostic image, the generated and the true one, of the first 8 scenes.
        step: Optimiser steps so far.
        inference_steps: Denoising steps.
        guidance_scale: Weight of guidance.
        seed: Of the noise of the first scene.

    Returns:
        - ``l1_shirt``, ``ssim_shirt``: `masked_l1` and `masked_ssim` over ``garment_region``, the
          mean of all scenes where that is not empty.
        - ``l1_mean_colour``, ``ssim_mean_colour``: the same of the true images with that region
          filled with the mean colour of the garment under ``garment_mask``: what is to be beaten.
        - ``pck10``: `pck` at .10 of the peak of the specific-reference maps over all layers, heads
          and steps, over all cells of a 16 x 12 grid more than half of which show garment; the true
          place is the mean of ``flow`` in the cell. Not for data without flow, such as VITON-HD.

    Raises:
        ValueError: A needed field is missing, or does not fit the model.
        ImportError: torchmetrics is not installed.
        OSError: The panel cannot be written.
    """
    fields = dict(scenes) if isinstance(scenes, Mapping) else scenes._asdict()
    if missing := [name for name in _NEEDED if name not in fields]:
        raise ValueError(f"scenes must have {', '.join(_NEEDED)}, got none of {missing}")
    fields = {name: values.cpu() for name, values in fields.items()}
    generated, correct = [], []
    with _evaluating(pipeline) as model:
        for first in range(0, len(fields["image"]), _BATCH):
            batch = {name: values[first : first + _BATCH] for name, values in fields.items()}
            run = _Run(model, inference_steps, guidance_scale, seed + first)
            if "flow" in batch and "garment_region" in batch:
                images, right = _follow(run, batch)
                correct.append(right)
            else:
                images = run(batch)
            generated.append(images)
    images = torch.cat(generated)
    make_folder(folder)
    panel = _panel({**fields, "generated": images}, heading=f"Step {step}")
    write(folder / f"panel-{step:08d}.png", panel)
    figures = _picture_figures(images, fields)
    if correct and len(hits := torch.cat(correct)):
        figures["pck10"] = hits.double().mean().item()
    return figures


class _Run:
    """The pipeline with the settings of the validation."""

    def __init__(self, model: CustomPipeline, steps: int, guidance_scale: float, seed: int) -> None:
        self.model = model
        self.steps, self.guidance_scale, self.seed = steps, guidance_scale, seed

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Images ``[batch, 3, height, width]`` in [0, 1], fp32 on the CPU."""
        count, _, height, width = batch["image"].shape
        images: Tensor = self.model(
            agnostic_image=batch["agnostic"],
            pose_image=batch["pose"],
            reference_image=batch["garment"],
            height=height,
            width=width,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            generator=[torch.Generator().manual_seed(self.seed + i) for i in range(count)],
            vae_posterior="mode",
            output_type="pt",
            return_dict=False,
        )[0]
        return images.float().cpu()


def _follow(run: _Run, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The images, and for each query cell of all scenes, bool, whether its map peaks in place."""
    # [batch, rows, columns] and [batch, 2, rows, columns]
    known = (batch["garment_region"] >= 0.5) & batch["flow"].isfinite().all(1)
    share = resize(known.float(), QUERY_GRID, mode="area")
    flow = torch.where(known[:, None], batch["flow"], 0)
    places = resize(flow, QUERY_GRID, mode="area") / share[:, None]
    asked = share > 0.5
    cells = [(int(row), int(column)) for row, column in asked.any(0).nonzero()]
    if not cells:
        return run(batch), asked.new_zeros(0)
    queries = [Patch(row, column, QUERY_GRID) for row, column in cells]
    with record(
        run.model, regions=queries, directions="generated_to_reference", time_groups=1
    ) as recorder:
        images = run(batch)
    maps = recorder.maps().to("cpu")
    size = run.model.reference_grid
    right = []
    for query in queries:
        here = asked[:, query.row, query.column]
        found = peak(maps.specific_reference(query, size=size)[here])
        true = places[here, :, query.row, query.column] * torch.tensor(size)
        right.append(pck(found, true, threshold=0.10, diagonal=math.hypot(*size), reduction="none"))
    return images, torch.cat(right)


def _picture_figures(images: Tensor, fields: Mapping[str, Tensor]) -> dict[str, float]:
    region, cover = fields.get("garment_region"), fields.get("garment_mask")
    if region is None:
        return {}
    shown = region.flatten(1).any(1)
    if not bool(shown.any()):
        return {}
    candidates = {"shirt": images}
    if cover is not None and bool(cover.flatten(1).any(1)[shown].all()):
        weights = resize(cover, _size(fields["garment"]), mode="area")[:, None]
        colour = (fields["garment"] * weights).sum((2, 3), keepdim=True)
        colour = colour / weights.sum((2, 3), keepdim=True).clamp(min=1)
        inside = region[:, None]
        candidates["mean_colour"] = fields["image"] * (1 - inside) + colour * inside
    figures = {}
    for metric, measure in (("l1", masked_l1), ("ssim", masked_ssim)):
        for name, candidate in candidates.items():
            values = measure(candidate[shown], fields["image"][shown], region[shown])
            figures[f"{metric}_{name}"] = values.mean().item()
    return figures


def _size(pictures: Tensor) -> tuple[int, int]:
    return pictures.shape[-2], pictures.shape[-1]


def _panel(pictures: Mapping[str, Tensor], *, heading: str) -> bytes:
    """The rows as one PNG file."""
    from PIL import Image

    from i2am.plots import contact_sheet

    rows = min(PANEL_ROWS, len(pictures["image"]))
    tiles = []
    for row in range(rows):
        for name in _COLUMNS:
            pixels = (pictures[name][row].permute(1, 2, 0) * 255).round().to(torch.uint8)
            factor = max(1, _TILE // len(pixels))
            tiles.append(pixels.repeat_interleave(factor, 0).repeat_interleave(factor, 1).numpy())
    titles = list(_COLUMNS.values()) * rows
    sheet = contact_sheet(tiles, titles, columns=len(_COLUMNS), heading=heading, color_bar=False)
    file = BytesIO()
    Image.fromarray(sheet).save(file, format="PNG")
    return file.getvalue()


@contextmanager
def _evaluating(pipeline: CustomPipeline) -> Iterator[CustomPipeline]:
    """A pipeline of the same networks in evaluation mode; the given one is left untouched."""
    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    modes = [(module, module.training) for part in networks for module in part.modules()]
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    model = CustomPipeline(
        **{**pipeline.components, "scheduler": scheduler},
        reference_size=pipeline.reference_size,
        trained=pipeline.trained,
    )
    model.set_progress_bar_config(disable=True)
    try:
        for part in networks:
            part.eval()
        yield model
    finally:
        for module, training in modes:
            module.training = training
