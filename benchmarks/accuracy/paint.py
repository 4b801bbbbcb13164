"""The paint test: a spot on the garment where a map points to changes the patch that was asked.

Every scene asks one cell of the shirt. The garment gets a square of inverse colours at the peak of
the cell's map (all layers), at the true place, or at a random place of the garment far from it, and
the picture is made again from the same noise.
"""

import torch
import torch.nn.functional as F
from accuracy.generating import batches, generate
from accuracy.places import CELL, centres, query_places
from accuracy.reading import join, patch
from torch import Tensor

import i2am
from i2am.data.paper_doll import Scenes, render
from i2am.metrics import peak
from i2am.models.custom import CustomPipeline

SPOT = 16
FAR = 28
"""Pixels: side of the square, and how far a random place is from the true one at least."""
NEAR_CELLS = 2.0


def paint_test(
    pipe: CustomPipeline,
    indices: list[int],
    *,
    split: str,
    steps: int,
    guidance_scale: float,
    batch: int,
) -> dict[str, Tensor]:
    """What a spot changes, per scene.

    Returns:
        fp64 ``[scenes]`` by ``"place/measure"`` for the places peak, true and random. The measures:
        ``change_at_patch`` and ``change_on_shirt``, mean absolute differences; ``rank_on_shirt``,
        the share of the shirt's other cells that changed more than the patch; ``largest_near``,
        whether the cell that changed most lies within two cells of the patch. Scenes without a
        cell whose true place has garment far enough from it are left out.
    """
    settings = {"steps": steps, "guidance_scale": guidance_scale}
    found = []
    for some in batches(indices, batch):
        scenes = render(some, split=split)
        asked = [_ask(scenes, sample, index) for sample, index in enumerate(some)]
        kept = [sample for sample, question in enumerate(asked) if question is not None]
        if not kept:
            continue
        scenes = Scenes(*(field[kept] for field in scenes))
        some = [some[sample] for sample in kept]
        cells, true, random = zip(*(asked[sample] for sample in kept), strict=True)
        regions = [patch(cell) for cell in sorted(set(cells))]
        with i2am.record(pipe, regions=regions, directions="generated_to_reference") as recorder:
            before = generate(pipe, scenes, some, **settings)
        maps = recorder.maps()
        read = [maps.specific_reference(patch(cell))[i] for i, cell in enumerate(cells)]
        places = {
            "peak": peak(torch.stack(read)),
            "true": torch.stack(true),
            "random": torch.stack(random),
        }
        for name, place in places.items():
            garments = paint(scenes.garment, place)
            after = generate(pipe, scenes, some, garments=garments, **settings)
            change = (after.double() - before.double()).abs().mean(1)
            measures = _measure(change, torch.tensor(cells), scenes)
            found.append({f"{name}/{measure}": of for measure, of in measures.items()})
    return join(found)


def paint(garments: Tensor, places: Tensor) -> Tensor:
    """Garment pictures, each with a square of inverse colours.

    Args:
        garments: ``[batch, 3, height, width]`` in [0, 1].
        places: The squares' centres ``[batch, 2]`` in cells.
    """
    painted = garments.clone()
    height, width = garments.shape[-2:]
    for picture, (y, x) in zip(painted, (places * CELL).round().long().tolist(), strict=True):
        top, left = y - SPOT // 2, x - SPOT // 2
        rows = slice(max(top, 0), min(top + SPOT, height))
        columns = slice(max(left, 0), min(left + SPOT, width))
        picture[:, rows, columns] = 1 - picture[:, rows, columns]
    return painted


def _ask(scenes: Scenes, sample: int, seed: int) -> tuple[int, Tensor, Tensor] | None:
    """A cell of the shirt at random, its true place, and a random far place, both in cells."""
    scene = Scenes(*(field[sample : sample + 1] for field in scenes))
    generator = torch.Generator().manual_seed(seed)
    places = query_places(scene, share=0.9)
    garment = F.avg_pool2d(scene.garment_mask[:, None], CELL).flatten() > 0.5
    candidates = centres()[garment]
    for choice in torch.randperm(len(places.cell), generator=generator).tolist():
        true = places.true[choice]
        far = candidates[(candidates - true).norm(dim=-1) * CELL >= FAR]
        if len(far):
            random = far[torch.randint(len(far), (), generator=generator)]
            return int(places.cell[choice]), true, random
    return None


def _measure(change: Tensor, cells: Tensor, scenes: Scenes) -> dict[str, Tensor]:
    region = scenes.garment_region.double()
    each = F.avg_pool2d(change[:, None], CELL).flatten(1)
    at_patch = each.gather(1, cells[:, None])
    shirt = torch.zeros_like(each, dtype=torch.bool)
    places = query_places(scenes)
    shirt[places.scene, places.cell] = True
    more = (shirt & (each > at_patch)).sum(1) / (shirt.sum(1) - 1)
    middle = centres()
    off = (middle[each.argmax(1)] - middle[cells]).norm(dim=-1)
    return {
        "change_at_patch": at_patch[:, 0],
        "change_on_shirt": (change * region).sum((1, 2)) / region.sum((1, 2)),
        "rank_on_shirt": more.double(),
        "largest_near": (off <= NEAR_CELLS).double(),
    }
