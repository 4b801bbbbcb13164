"""Files to record on, a model folder, and ways to run the command line."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from i2am.cli import main

ARGUMENTS = ("person", "mask", "reference")
COMMAND = "import runpy; runpy.run_module('i2am', run_name='__main__', alter_sys=True)"


class Done(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a person and pose of 96 x 128 pixels, a square reference, and masks of both."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "files"
    folder.mkdir()
    for name, size in (("person", (128, 96)), ("pose", (128, 96)), ("reference", (80, 80))):
        pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    mask = np.zeros((128, 96), dtype=np.uint8)
    mask[40:110, 20:80] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    reference_mask = np.zeros((80, 80), dtype=np.uint8)
    reference_mask[20:60, 10:50] = 255
    Image.fromarray(reference_mask).save(folder / "reference_mask.png")
    return folder


@pytest.fixture
def record_line(files: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of a short `i2am record`; a keyword replaces or adds an option, None drops it."""

    def line(*flags: str, model: str = "pocket", **options: Any) -> list[str]:
        given: dict[str, Any] = {name: files / f"{name}.png" for name in ARGUMENTS}
        given |= {"steps": 4, "time_groups": 2, "out": tmp_path / "out", **options}
        arguments = ["record", str(model)]
        for name, value in given.items():
            for one in value if isinstance(value, list) else [value]:
                if one is not None:
                    arguments += [f"--{name.replace('_', '-')}", str(one)]
        return [*arguments, *flags]

    return line


@pytest.fixture
def run_here(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], Done]:
    """Runs a command in this process."""

    def run(arguments: list[str]) -> Done:
        capsys.readouterr()
        code = main(arguments)
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture
def start(fork: Callable[..., Any]) -> Callable[..., Any]:
    """Starts a command in a process of its own, behind some code that prepares it."""

    def started(arguments: list[str], before: str = "") -> Any:
        return fork(f"{before}\n{COMMAND}", *arguments)

    return started


@pytest.fixture
def run_apart(start: Callable[..., Any]) -> Callable[..., Done]:
    """Runs a command in a process of its own, to its end."""

    def run(arguments: list[str], before: str = "") -> Done:
        process = start(arguments, before)
        out, err = process.communicate(timeout=100)
        return Done(process.returncode, out, err)

    return run


@pytest.fixture
def run_fresh() -> Callable[..., Done]:
    """Runs a command with a new interpreter, which finds modules of a folder before others."""

    def run(arguments: list[str], path: Path | None = None) -> Done:
        folders = [str(path)] * (path is not None) + [os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            [sys.executable, "-P", "-m", "i2am", *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))},
            capture_output=True,
            text=True,
            timeout=100,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def paint_by_example_folder(tmp_path: Path) -> Path:
    """A tiny Paint-by-Example with random weights, in diffusers layout."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPVisionConfig

    from i2am.models import PaintByExampleImageEncoder, PaintByExamplePipeline

    clip = CLIPVisionConfig(
        hidden_size=32,
        projection_dim=24,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=4,
        image_size=16,
        patch_size=4,
    )
    unet = UNet2DConditionModel(
        sample_size=(64, 48),
        in_channels=9,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    pipeline = PaintByExamplePipeline(
        vae=vae,
        image_encoder=PaintByExampleImageEncoder(clip),
        unet=unet,
        scheduler=DDIMScheduler(),
    )
    folder = tmp_path / "painter"
    pipeline.save_pretrained(folder)
    return folder
