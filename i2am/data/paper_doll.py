"""Try-on scenes with known correspondence: a paper doll, its T-shirt, and where each pixel is from.

The colour of a garment is a function of canonical garment coordinates, evaluated in the picture
of the person and in the picture of the garment. So the flow between them is exact everywhere.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from i2am.data.paper_doll_folder import write_viton_hd
from i2am.data.paper_doll_person import PARTS
from i2am.data.paper_doll_scene import SIZE, SPLITS, draw_scene, garment_of, person_of

__all__ = ["PARTS", "SIZE", "SPLITS", "PaperDolls", "Scenes", "render", "write_viton_hd"]


class Scenes(NamedTuple):
    """A batch of scenes; every tensor is contiguous, fp32 where nothing else is said.

    Attributes:
        image: ``[batch, 3, height, width]`` in [0, 1]: the person wearing the garment.
        garment: The same shape: the garment on plain light ground.
        agnostic: The same shape: ``image`` with the mask painted grey 0.5.
        pose: The same shape, as a render of DensePose: a colour for each part, on torso and upper
            arms canonical coordinates as red (across) and green (down), black ground. It
            belongs to the body: no garment changes it.
        mask: ``[batch, height, width]``, 1 = to generate, 0 = given. Also independent of garments.
        garment_mask: The same shape, 1 = garment, on ``garment``.
        garment_region: The same shape, 1 = pixel of ``image`` that shows the garment.
        flow: ``[batch, 2, height, width]``: where on ``garment`` the content of each pixel of
            ``garment_region`` is, (y, x) as fractions of height and width: pixel i of n has its
            centre at (i + 0.5) / n. NaN elsewhere.
        parts: ``[batch, height, width]`` uint8: labels of ``image``, indices of ``PARTS``.
    """

    image: Tensor
    garment: Tensor
    agnostic: Tensor
    pose: Tensor
    mask: Tensor
    garment_mask: Tensor
    garment_region: Tensor
    flow: Tensor
    parts: Tensor


def render(
    indices: Sequence[int], *, split: str = "train", garments: Sequence[int] | None = None
) -> Scenes:
    """Draws scenes; each depends on its split and index alone, not on the batch.

    Args:
        indices: Which scenes, counted from 0 without an end.
        split: ``"train"`` or ``"test"``: disjoint streams.
        garments: For every scene the index of the scene whose garment is worn instead (unpaired);
            None for the scene's own.

    Returns:
        The scenes in the order of ``indices``.

    Raises:
        ValueError: If the split is unknown, an index is negative or none is given, or ``garments``
            has another length than ``indices``.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    people = [int(index) for index in indices]
    worn = people if garments is None else [int(index) for index in garments]
    if not people:
        raise ValueError("indices must name at least one scene, got none")
    if len(worn) != len(people):
        raise ValueError(
            f"garments must have one index for each scene, got {len(worn)} for {len(people)}"
        )
    for name, numbers in (("indices", people), ("garments", worn)):
        if min(numbers) < 0:
            raise ValueError(f"{name} must not be negative, got {min(numbers)}")
    scenes = [
        draw_scene(person_of(split, index), garment_of(split, garment))
        for index, garment in zip(people, worn, strict=True)
    ]
    return Scenes(
        **{
            name: torch.from_numpy(
                np.ascontiguousarray(np.stack([scene[name] for scene in scenes]))
            )
            for name in Scenes._fields
        }
    )


class PaperDolls(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The first scenes of a split as a dataset: each item has the fields of :class:`Scenes`.

    Args:
        count: How many scenes, at least 1.
        split: ``"train"`` or ``"test"``.

    Raises:
        ValueError: If the count is below 1 or the split unknown.
    """

    def __init__(self, count: int, split: str = "train") -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        self.count, self.split = count, split

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(f"index must be in 0..{self.count - 1}, got {index}")
        scenes = render([index], split=self.split)
        return {name: field[0] for name, field in scenes._asdict().items()}
