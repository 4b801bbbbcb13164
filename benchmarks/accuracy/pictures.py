"""How good the pictures are, and what they have to beat."""

import torch
from accuracy.generating import generate, round_trip
from torch import Tensor

from i2am.data.paper_doll import Scenes, render
from i2am.metrics import masked_l1, masked_ssim
from i2am.models.custom import CustomPipeline


def score(images: Tensor, scenes: Scenes) -> dict[str, Tensor]:
    """L1 and SSIM against the truth on the shirt, per sample."""
    return {
        "l1": masked_l1(images, scenes.image, scenes.garment_region),
        "ssim": masked_ssim(images, scenes.image, scenes.garment_region),
    }


def compare(pipe: CustomPipeline, scenes: Scenes, images: Tensor) -> dict[str, Tensor]:
    """Scores of generated pictures and of their rivals, by ``"picture/score"``."""
    found = {
        "generated": score(images, scenes),
        "mean garment colour": score(mean_colour(scenes), scenes),
        "autoencoder round trip": score(round_trip(pipe, scenes.image), scenes),
    }
    scores = _flat(found)
    scores["generated/l1_mask"] = masked_l1(images, scenes.image, scenes.mask)
    scores["generated/l1_outside"] = masked_l1(images, scenes.image, 1 - scenes.mask)
    return scores


def swap(
    pipe: CustomPipeline, indices: list[int], *, split: str, steps: int, guidance_scale: float
) -> dict[str, Tensor]:
    """The next scene's garment instead: far from the picture of the scene's own, near to the truth.

    "wrong garment" scores the picture against that of the scene's own garment, "unpaired" against
    the same person in the garment that the model was given.
    """
    own = render(indices, split=split)
    other = render(indices, split=split, garments=[index + 1 for index in indices])
    images = generate(pipe, other, indices, steps=steps, guidance_scale=guidance_scale)
    return _flat(
        {
            "wrong garment": score(images, own),
            "unpaired": score(images, other),
            "unpaired mean garment colour": score(mean_colour(other), other),
        }
    )


def mean_colour(scenes: Scenes) -> Tensor:
    """The true pictures with the shirt in one colour, the mean of the garment's picture."""
    on_garment, region = scenes.garment_mask[:, None], scenes.garment_region[:, None]
    area = on_garment.sum((-2, -1), keepdim=True)
    colour = (scenes.garment * on_garment).sum((-2, -1), keepdim=True) / area
    return torch.lerp(scenes.image, colour.expand_as(scenes.image), region)


def _flat(found: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{picture}/{name}": values for picture, of in found.items() for name, values in of.items()
    }
