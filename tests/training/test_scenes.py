"""Scenes and latents: what is read is what was rendered, and caches are whole or made anew."""

import json

import numpy as np
import pytest
import torch

from i2am.data.paper_doll import SIZE, render
from i2am.training.latents import cached_latents
from i2am.training.scenes import (
    READY,
    CachedScenes,
    FolderScenes,
    PaperDollScenes,
    cached_arrays,
    cached_scenes,
)


class Counting:
    """Batches that count how often they are made."""

    def __init__(self, value: int, *, fails: bool = False) -> None:
        self.value, self.fails, self.calls = value, fails, 0

    def __call__(self):
        self.calls += 1
        yield {"image": np.full((2, 3), self.value, np.uint8)}
        if self.fails:
            raise RuntimeError("killed")
        yield {"image": np.full((1, 3), self.value + 1, np.uint8)}


def test_a_cache_is_made_once_per_key(tmp_path) -> None:
    folder = tmp_path / "cache" / "scenes"
    first = Counting(5)
    arrays = cached_arrays(folder, {"seed": 1}, 3, first)
    assert arrays["image"][:, 0].tolist() == [5, 5, 6]
    again = Counting(7)
    assert cached_arrays(folder, {"seed": 1}, 3, again)["image"][0, 0] == 5
    assert (first.calls, again.calls) == (1, 0)
    assert cached_arrays(folder, {"seed": 2}, 3, again)["image"][0, 0] == 7


def test_a_cache_that_was_not_finished_is_not_used(tmp_path) -> None:
    folder = tmp_path / "scenes"
    with pytest.raises(RuntimeError, match="killed"):
        cached_arrays(folder, {}, 3, Counting(5, fails=True))
    assert not folder.exists()
    assert cached_arrays(folder, {}, 3, Counting(6))["image"][0, 0] == 6
    (folder / READY).unlink()
    assert cached_arrays(folder, {}, 3, Counting(7))["image"][0, 0] == 7
    (folder / READY).write_text("{")
    assert cached_arrays(folder, {}, 3, Counting(8))["image"][0, 0] == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_scenes_are_the_rendered_ones(tmp_path, workers) -> None:
    source = PaperDollScenes(35)
    cache = cached_scenes(source, tmp_path / "scenes", {}, workers, progress=False)
    assert len(cache) == len(source) == 35
    read = cache.read([34, 3, 3])
    for name, wanted in source.read([34, 3, 3]).items():
        torch.testing.assert_close(read[name], wanted, atol=0.5 / 255 + 1e-6, rtol=0)
    assert list(cache.read([1], ["pose"])) == ["pose"]


def test_paper_dolls() -> None:
    batch = PaperDollScenes(4, "test").read([2])
    assert torch.equal(batch["image"], render([2], split="test").image)
    assert batch["garment"].shape == (1, 3, *SIZE)


def test_a_folder(viton) -> None:
    scenes = FolderScenes(viton, "train", (32, 24))
    assert len(scenes) == 6
    batch = scenes.read([5, 0])
    assert {name: tuple(x.shape) for name, x in batch.items()} == {
        **{name: (2, 3, 32, 24) for name in ("image", "garment", "agnostic", "pose")},
        **{name: (2, 32, 24) for name in ("mask", "garment_region")},
    }
    assert len(FolderScenes(viton, "train", (32, 24), 4)) == 4
    with pytest.raises(ValueError, match=r"scenes must be at most 6 for .*, got 7"):
        FolderScenes(viton, "train", (32, 24), 7)


def test_latents_are_kept_by_their_key(tmp_path, viton, build) -> None:
    pipeline, folder = build(), tmp_path / "latents"
    scenes = FolderScenes(viton, "train", (32, 24))

    def encode(key: int):
        options = {"key": {"vae": key}, "workers": 0, "progress": False}
        return cached_latents(pipeline, scenes, folder, **options)

    first = encode(1).read([4, 1])
    with torch.no_grad():
        pipeline.vae.quant_conv.bias += 1
    assert torch.equal(encode(1).read([4, 1])["image"], first["image"])
    assert not torch.equal(encode(2).read([4, 1])["image"], first["image"])
    assert json.loads((folder / READY).read_text()) == {"vae": 2}
    assert first["mask"].shape == (2, 16, 12)
    assert first["garment"].shape == (2, 3, 16, 12)


def test_cached_scenes_say_their_number() -> None:
    assert len(CachedScenes({"image": np.zeros((7, 3, 2, 2), np.uint8)})) == 7
