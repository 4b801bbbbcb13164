"""What stage 2 sees of every scene, encoded once: the autoencoder does not change any more."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate
from tqdm.auto import tqdm

from i2am.models.custom import CustomPipeline
from i2am.training.scenes import SceneSource, cached_arrays, chunks, from_bytes, to_bytes

ENCODED = ("image", "agnostic", "pose")


class LatentScenes:
    """Encoded scenes as memory-mapped arrays.

    Args:
        arrays: `image`, `agnostic`, `pose` ``[scenes, channels, h, w]`` fp16 latents as the UNet
            takes them; uint8 `garment` ``[scenes, 3, reference height, reference width]``, `mask`
            ``[scenes, h, w]`` and `garment_region` ``[scenes, height, width]``, 255 standing for 1.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = dict(arrays)

    def __len__(self) -> int:
        return len(self.arrays["image"])

    def read(self, indices: Iterable[int], names: Iterable[str] = ()) -> dict[str, Tensor]:
        """One batch, fp32; only what is named, where anything is."""
        picked = np.asarray(list(indices))
        batch = {}
        for name in names or self.arrays:
            rows = self.arrays[name][picked]
            if name in ENCODED:
                batch[name] = torch.from_numpy(rows).float()
            else:
                batch[name] = from_bytes(rows)
        return batch


def cached_latents(
    pipeline: CustomPipeline,
    source: SceneSource,
    folder: Path,
    *,
    key: Mapping[str, object],
    workers: int,
    progress: bool,
) -> LatentScenes:
    """Encodes all scenes of `source` once.

    Args:
        pipeline: Its VAE encodes, with the mode of the posterior; it stays where it is.
        source: The scenes.
        folder: Where the arrays are kept.
        key: Plain values that decide the content.
        workers: Processes that read scenes.
        progress: Whether to show a progress bar.
    """

    def batches() -> Iterator[dict[str, np.ndarray]]:
        with tqdm(total=len(source), desc="latents", unit="scene", disable=not progress) as bar:
            for batch in chunks(source, workers):
                yield {
                    name: values.numpy() if name in ENCODED else to_bytes(values)
                    for name, values in encode(pipeline, batch).items()
                }
                bar.update(len(batch["image"]))

    return LatentScenes(cached_arrays(folder, key, len(source), batches))


@torch.no_grad()
def encode(pipeline: CustomPipeline, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One batch of scenes as `LatentScenes` holds it, on the CPU.

    The garment gets the encoder's size; the mask becomes the share of its pixels per latent cell.
    """
    vae = pipeline.vae
    encoded = {}
    for name in ENCODED:
        pixels = batch[name].to(device=vae.device, dtype=vae.dtype) * 2 - 1
        latents = vae.encode(pixels).latent_dist.mode().float()
        latents = (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
        encoded[name] = latents.half().cpu()
    garment = batch["garment"]
    if tuple(garment.shape[-2:]) != pipeline.reference_size:
        garment = interpolate(
            garment, pipeline.reference_size, mode="bicubic", antialias=True
        ).clamp(0, 1)
    encoded["garment"] = garment
    encoded["mask"] = adaptive_avg_pool2d(batch["mask"], encoded["image"].shape[-2:])
    if "garment_region" in batch:
        encoded["garment_region"] = batch["garment_region"]
    return encoded
