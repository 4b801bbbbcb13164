"""What decides the bytes of a run: model, data, settings, versions; and their fingerprint."""

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import i2am
from i2am.data.vitonhd import VitonHD
from i2am.data.vitonhd_pairs import Setting
from i2am.evaluation.plan_file import fingerprint_of
from i2am.evaluation.shard import SCHEMA
from i2am.files import canonical, parse_json, sha256_of_folder
from i2am.files.digests import sha256_of_files

if TYPE_CHECKING:
    from i2am.models.base import ReferencePipeline

MAPS = ("float16", "float32", "none")
OFFLOADS = ("none", "model", "sequential")
_PACKAGES = ("torch", "diffusers", "transformers", "numpy", "pillow", "safetensors")
_SETTINGS: tuple[Setting, ...] = ("paired", "unpaired")


@dataclass(frozen=True)
class Settings:
    """How a model is run over a data set.

    Args:
        size: Height and width of the images.
        steps: Denoising steps.
        guidance: Guidance scale.
        eta: Noise of DDIM.
        pairs: Which garments people get: their own, those of the list, or both in turn.
        sampler: Named sampler, None for the model's own.
        seed: Together with a sample's id the seed of all its noise.
        time_groups: Groups of steps kept apart in the maps.
        preset: How attention is recorded: ``"paper"``, or ``"official"`` as in the published code.
        batch: Samples per call of the model, part of what decides the last bits of an image.
        shard: Samples per shard, the unit of work, commit and failure.
        threads: Threads of torch on the CPU, which decide last bits of what is computed there.
        dtype: Of the weights.
        device: Type of the device, ``"cpu"`` or ``"cuda"``.
        maps: What is stored of the maps: float16, float32 or none.
        attach: As for :func:`i2am.record`.
        offload: Parts of the model wait in main memory: ``"model"``, ``"sequential"`` or not.
        vae_slicing: Decode one image at a time.
        vae_tiling: Decode an image in tiles, which changes it a little.
        stretch: Squeeze pictures of another shape instead of refusing them.

    Raises:
        ValueError: A setting is out of its range, or two do not go together.
    """

    size: tuple[int, int]
    steps: int
    guidance: float
    eta: float = 0.0
    pairs: tuple[Setting, ...] = _SETTINGS
    sampler: str | None = None
    seed: int = 0
    time_groups: int = 5
    preset: str = "paper"
    batch: int = 8
    shard: int = 16
    threads: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    maps: str = "float16"
    attach: str = "beside"
    offload: str = "none"
    vae_slicing: bool = False
    vae_tiling: bool = False
    stretch: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "time_groups", "batch", "shard", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps < self.time_groups:
            raise ValueError(
                f"steps must be at least the {self.time_groups} time groups, got {self.steps}"
            )
        if self.shard < self.batch:
            raise ValueError(f"shard must be at least the batch of {self.batch}, got {self.shard}")
        unknown = [name for name in self.pairs if name not in _SETTINGS]
        if unknown or not self.pairs or len({*self.pairs}) < len(self.pairs):
            raise ValueError(f"pairs must be paired, unpaired or both, got {', '.join(self.pairs)}")
        if self.offload != "none" and self.device == "cpu":
            raise ValueError(f"offload {self.offload} needs a GPU to load to, got device cpu")


def make_plan(
    pipe: "ReferencePipeline",
    data: Mapping[str, VitonHD],
    settings: Settings,
    *,
    model: str,
    folder: Path,
    weights_sha256: str,
    contents: bool = False,
) -> dict[str, Any]:
    """Content of ``run.json``.

    Args:
        pipe: The model, with its sampler.
        data: The data set under each of the settings' pairs.
        settings: The rest of what decides.
        model: The model's name or folder; where it lies does not count.
        folder: The data set's; likewise.
        weights_sha256: Of the model's files, see `digest_of`.
        contents: Whether the contents of the data set's files count, not their sizes alone.

    Returns:
        JSON values. A pair is its id, the person's and the garment's name, the line of the list and
        the file name of the person's picture. The ``fingerprint`` is the same wherever model and
        data lie, and however many processes compute the run.
    """
    scheduler = {
        name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")
    }
    plan: dict[str, Any] = {
        "schema": SCHEMA,
        "i2am": i2am.__version__,
        "model": {
            "name": model,
            "pipeline": type(pipe).__name__,
            "scheduler": {"class": type(pipe.scheduler).__name__, **scheduler},
            "trained": pipe.trained,
            "weights_sha256": weights_sha256,
        },
        "data": {
            "folder": str(folder.absolute()),
            "split": data[settings.pairs[0]].split,
            "digest": {name: data[name].digest(contents=contents) for name in settings.pairs},
            "pairs": {
                name: [
                    [p.id, p.person, p.garment, p.line, data[name].path("image", number).name]
                    for number, p in enumerate(data[name].pairs)
                ]
                for name in settings.pairs
            },
        },
        "settings": asdict(settings),
        "versions": {
            **{name: version(name) for name in _PACKAGES},
            "processor": _processor(settings.device),
        },
    }
    plan["fingerprint"] = fingerprint_of(plan)
    # as it is read again: tuples have become lists
    stored: dict[str, Any] = parse_json(canonical(plan), "the plan")
    return stored


def digest_of(model: str) -> str:
    """SHA-256 over the names and contents of a model's files, or of a built-in model's weights.

    Args:
        model: What `i2am.models.load_pipeline` takes. What links in its folder lead to counts.

    Raises:
        ValueError: A link leads back to a folder that holds it.
        OSError: A file cannot be read.
    """
    from i2am.models.pocket import pocket_weights

    if Path(model).is_dir():
        return sha256_of_folder(Path(model))
    weights = pocket_weights()
    return sha256_of_files(weights.parent, [weights]) if weights else sha256_of_files(Path(), [])


def seed_of(seed: int, id: str) -> int:
    """Seed of a sample's noise, 64 bits of SHA-256 of the run's seed and the sample's id.

    A CPU generator of torch takes 32 of them, so of ten million samples some ten thousand share
    their noise with another; of two thousand, none in all likelihood.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{id}".encode()).digest()[:8], "little")


def _processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {capability}"
