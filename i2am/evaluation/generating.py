"""One call of a model under the recorder, for a batch of a data set's items."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import i2am
from i2am.data.images import ImageRejected
from i2am.data.vitonhd import VitonHD
from i2am.evaluation.errors import OutOfMemory, out_of_memory
from i2am.evaluation.plan import Settings

if TYPE_CHECKING:
    from i2am.models.base import ReferencePipeline

_TRIED = 16

Item = Mapping[str, Tensor]
"""What `VitonHD` gives for a pair; stacked, for a batch."""

# what a pipeline calls its images, and what a data set does
_IMAGES = {
    "person": "image",
    "mask": "mask",
    "reference": "garment",
    "pose": "pose",
    "agnostic": "agnostic",
    "warped": "warped",
    "warped_mask": "warped_mask",
}


def generate(
    pipe: "ReferencePipeline", items: Item, seeds: Sequence[int], settings: Settings
) -> tuple[Tensor, i2am.AttributionMaps]:
    """Makes the images of a batch and records all their maps in the same run.

    Args:
        pipe: The model.
        items: Stacked items, ``[samples, ...]``.
        seeds: One per sample, of all its noise.
        settings: How the model is run.

    Returns:
        Images ``[samples, 3, height, width]`` in [0, 1], and their maps.

    Raises:
        OutOfMemory: It does not fit.
    """
    layout = replace(pipe.attribution_layout(), prefix_votes=settings.preset == "official")
    mask, reference_mask = (_not_empty(items[name]) for name in ("mask", "garment_mask"))
    images = {name: items.get(key) for name, key in _IMAGES.items()}
    images["reference_mask"] = reference_mask
    try:
        with i2am.record(
            pipe,
            layout=layout,
            time_groups=settings.time_groups,
            mask=mask,
            reference_mask=reference_mask,
            keep_keys=settings.preset == "official",
            attach=settings.attach,
        ) as recorder:
            made = pipe(
                **pipe.image_arguments(images),
                **pipe.size_arguments(settings.size),
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                eta=settings.eta,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="pt",
            ).images
        return made, recorder.maps()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise OutOfMemory(
            f"a batch of {len(seeds)} does not fit into memory; start a new run with a smaller "
            "--batch, or with --memory-budget, --vae-slicing or --offload; shards that are "
            "committed stay"
        ) from error


def first_whole(data: VitonHD) -> Item:
    """The first item that can be read.

    Raises:
        ImageRejected: None of the first `_TRIED` can be: size or data set are wrong altogether.
    """
    refusals = []
    for position in range(min(_TRIED, len(data))):
        try:
            return data[position]
        except ImageRejected as error:
            refusals.append(error)
    raise ImageRejected(
        f"none of the first {len(refusals)} pairs can be read: {refusals[0]}", refusals[0].code
    )


def _not_empty(masks: Tensor) -> Tensor:
    """Masks to work by: one that is empty weighs nothing, and has no score whatever stands in."""
    empty = ~(masks > 0.5).flatten(1).any(1)
    return torch.where(empty[:, None, None], torch.ones_like(masks), masks)
