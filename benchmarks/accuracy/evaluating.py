"""One model on one set of scenes: generate under the recorder, read, score, sum up."""

from dataclasses import dataclass
from typing import Any

import torch
from accuracy.generating import batches, generate
from accuracy.pictures import compare
from accuracy.places import PERCENT, guesses, query_places, shares
from accuracy.reading import join, patch, read_positions, read_scores, standard_error, view_names
from torch import Tensor
from tqdm import tqdm

import i2am
from i2am.data.paper_doll import render
from i2am.models.custom import CustomPipeline


@dataclass(frozen=True)
class Measured:
    """What was read from the runs of a model."""

    layers: tuple[str, ...]
    views: list[str]
    positions: dict[str, Tensor]
    """``[views, query cells, 2]`` by how a position is taken."""
    true: Tensor
    """``[query cells, 2]``."""
    scene: Tensor
    """``[query cells]``, position of the cell's scene."""
    scores: dict[str, Tensor]
    """``[scenes]`` by ``"view/score"``."""
    pictures: dict[str, Tensor]
    """``[scenes]`` by ``"picture/score"``."""

    def accuracy(self, view: str) -> dict[str, dict[str, float]]:
        """PCK by how a position is taken and by the threshold in per cent."""
        number = self.views.index(view)
        return {name: shares(of[number], self.true) for name, of in self.positions.items()}

    def standard_errors(self) -> dict[str, dict[str, float]]:
        """Of the PCK of all layers together; scenes are drawn, the cells of one belong together."""
        errors: dict[str, dict[str, float]] = {}
        for name, positions in self.positions.items():
            of_scenes = [
                shares(positions[0, self.scene == scene], self.true[self.scene == scene])
                for scene in self.scene.unique()
            ]
            errors[name] = {
                percent: standard_error(torch.tensor([of[percent] for of in of_scenes]))
                for percent in PERCENT
            }
        return errors

    def best_layer(self) -> str:
        """The layer whose centroids are right most often at 10 %, then whose peaks are at 5 %."""

        def rank(view: str) -> tuple[float, float]:
            accuracy = self.accuracy(view)
            return accuracy["centroid"]["10"], accuracy["peak"]["5"]

        return max(self.layers, key=lambda layer: rank(f"layer {layer}"))


def evaluate(
    pipe: CustomPipeline,
    indices: list[int],
    *,
    split: str,
    steps: int,
    guidance_scale: float,
    batch: int,
    progress: tqdm,
    pictures: bool = True,
) -> Measured:
    """Generates scenes under the recorder and reads their maps.

    Args:
        pipe: The model.
        indices: The scenes.
        split: Their split.
        steps: Denoising steps.
        guidance_scale: Scale of classifier-free guidance.
        batch: Scenes at a time.
        progress: Moves on by one a scene.
        pictures: Whether to score the pictures as well.
    """
    positions, scores, compared, true, scene = [], [], [], [], []
    for some in batches(indices, batch):
        scenes = render(some, split=split)
        places = query_places(scenes)
        with i2am.record(
            pipe,
            regions=[patch(cell) for cell in places.cell.unique().tolist()],
            mask=scenes.mask,
            reference_mask=scenes.garment_mask,
        ) as recorder:
            images = generate(pipe, scenes, some, steps=steps, guidance_scale=guidance_scale)
        maps = recorder.maps()
        positions.append(read_positions(maps, places))
        scores.append(read_scores(maps, scenes))
        if pictures:
            compared.append(compare(pipe, scenes, images))
        true.append(places.true)
        scene.append(places.scene + len(indices) * len(scene))
        progress.update(len(some))
    return Measured(
        maps.layers,
        view_names(maps),
        join(positions, dim=1),
        torch.cat(true),
        torch.cat(scene),
        join(scores),
        join(compared),
    )


def without_a_model(indices: list[int], *, split: str, batch: int) -> dict[str, dict[str, Any]]:
    """What scenes say alone.

    Returns:
        ``"baselines"``: PCK of guesses by the threshold in per cent, expected over the query cells;
        ``"areas"``: the shares of the pictures that the masks cover.
    """
    chances, areas = [], []
    for some in batches(indices, batch):
        scenes = render(some, split=split)
        chances.append(guesses(scenes, query_places(scenes)))
        masks = {"mask": scenes.mask, "garment": scenes.garment_mask}
        areas.append({name: mask.double().mean((1, 2)) for name, mask in masks.items()})
    return {
        "baselines": {
            name: dict(zip(PERCENT, right.mean(0).tolist(), strict=True))
            for name, right in join(chances).items()
        },
        "areas": {name: float(area.mean()) for name, area in join(areas).items()},
    }
