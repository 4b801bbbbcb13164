"""Runs with pictures and a data set to compare them with, made up, for tests."""

import io
import zlib
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from i2am.evaluation.scores.inception import Features
from i2am.evaluation.scores.protocols import PROTOCOLS, Protocol
from i2am.evaluation.shard import SAMPLE
from i2am.evaluation.store import Store
from i2am.evaluation.testing import make_plan, make_shard

SIZE = (48, 36)
"""Height and width of generated pictures; real ones are twice as large."""


def make_run(
    folder: Path,
    data: Path,
    *,
    pairs: int = 6,
    noise: float = 20.0,
    commit: Collection[int] | None = None,
    failed: int | None = None,
    undefined: int | None = None,
    model: str = "pocket",
    **more: object,
) -> Store:
    """A run whose pictures are the real ones with noise.

    Args:
        folder: The run.
        data: The data set: its real pictures are written to ``test/image`` unless they are there.
        pairs: Pairs in each setting.
        noise: Standard deviation of the noise, of 255; IMACS falls as it grows.
        commit: Numbers of the shards to commit; None commits all.
        failed: Place in shard 0 of a sample that failed.
        undefined: Place in shard 0 of a sample without its last score.
        model: Its name.
        more: For `make_plan`.
    """
    plan = make_plan(pairs=pairs, noise=noise, **more)  # type: ignore[arg-type]
    plan["data"] |= {"folder": str(data), "split": "test"}
    plan["model"]["name"] = model
    store = Store.create(folder, plan)
    for setting in store.settings():
        for number in store.shard_numbers(setting) if commit is None else commit:
            holes = {"failed": failed, "undefined": undefined} if number == 0 else {}
            shard, _ = make_shard(plan, setting, number, maps=False, **holes)
            images = {}
            for id, position in zip(shard.ids, shard.index.tolist(), strict=True):
                real = _real(data / "test" / "image", plan["data"]["pairs"][setting][position][1])
                if SAMPLE not in shard.reasons.get(id, {}):
                    images[id] = _noisy(real, noise, zlib.crc32(f"{setting} {id}".encode()))
            checksums = {id: zlib.crc32(image) for id, image in images.items()}
            scores = 1 - shard.scores / 10 - noise / 100
            store.commit(replace(shard, scores=scores, images=checksums), images)
    return store


def tiny_extractor(features: int = 8) -> nn.Module:
    """A random network for uint8 ``[pictures, 3, height, width]``, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, features, 5, stride=4), nn.Tanh())

    class Extractor(nn.Module):
        num_features = features

        @torch.no_grad()
        def forward(self, pictures: Tensor) -> Tensor:
            return network(pictures.float() / 128 - 1).mean((2, 3))

    return Extractor()


def tiny_features(protocol: Protocol = PROTOCOLS["i2am"]) -> Callable[[], Features]:
    """What `score_run` takes in place of Inception."""
    return lambda: Features(protocol, tiny_extractor(), identity={"name": "tiny"})


def _real(folder: Path, person: str) -> Image.Image:
    path = folder / f"{person}.jpg"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(zlib.crc32(person.encode()))
        coarse = Image.fromarray(generator.integers(0, 256, (6, 5, 3), dtype=np.uint8))
        coarse.resize((2 * SIZE[1], 2 * SIZE[0]), Image.Resampling.BICUBIC).save(path, quality=95)
    with Image.open(path) as image:
        return image.convert("RGB")


def _noisy(real: Image.Image, noise: float, seed: int) -> bytes:
    pixels = np.asarray(real.resize((SIZE[1], SIZE[0])), dtype=np.float64)
    pixels = pixels + noise * np.random.default_rng(seed).standard_normal(pixels.shape)
    file = io.BytesIO()
    Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(file, format="PNG")
    return file.getvalue()
