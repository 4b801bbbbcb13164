"""Generated batches: the same picture for a scene, whatever batch it is made in."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from i2am.data.paper_doll import Scenes
from i2am.models.custom import CustomPipeline


def batches(indices: Sequence[int], size: int) -> Iterator[list[int]]:
    """The indices, `size` at a time."""
    for start in range(0, len(indices), size):
        yield [*indices[start : start + size]]


def generate(
    pipe: CustomPipeline,
    scenes: Scenes,
    indices: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    garments: Tensor | None = None,
) -> Tensor:
    """The pictures of scenes, ``[batch, 3, height, width]`` in [0, 1].

    Args:
        pipe: The model.
        scenes: The scenes.
        indices: Their indices, the seeds of their noise.
        steps: Denoising steps.
        guidance_scale: Scale of classifier-free guidance.
        garments: Garment pictures instead of the scenes' own.
    """
    return pipe(
        agnostic_image=scenes.agnostic,
        pose_image=scenes.pose,
        reference_image=scenes.garment if garments is None else garments,
        generator=[torch.Generator().manual_seed(index) for index in indices],
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        output_type="pt",
    ).images


@torch.no_grad()
def round_trip(pipe: CustomPipeline, images: Tensor) -> Tensor:
    """Pictures in [0, 1] through the autoencoder and back: the best that the model could do."""
    latents = pipe.vae.encode(images * 2 - 1).latent_dist.mode()
    return (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
