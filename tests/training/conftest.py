"""A custom model of a few thousand parameters, and a folder in VITON-HD layout to train it on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import DDIMScheduler

from i2am.data.paper_doll import write_viton_hd
from i2am.models import CustomConfiguration, CustomPipeline
from i2am.models.configuration import STABLE_DIFFUSION_BETAS
from i2am.training.recipe import Denoiser, Optimisation, Recipe

TINY = CustomConfiguration(
    vae={
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "scaling_factor": 0.5,
        "shift_factor": 0.1,
    },
    image_encoder={
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "mlp_ratio": 1,
        "image_size": 16,
        "patch_size": 4,
    },
    image_proj={"width": 16, "context_width": 16, "tokens": 13, "layers": 1},
    unet={
        "sample_size": (16, 12),
        "in_channels": 12,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    },
    scheduler=DDIMScheduler,
    scheduler_options={**STABLE_DIFFUSION_BETAS, "steps_offset": 1, "set_alpha_to_one": False},
    reference_size=(16, 12),
)


@pytest.fixture
def build() -> Callable[[], CustomPipeline]:
    """Builds the tiny model, always with the same random weights."""
    return lambda: TINY.build(seed=0)


@pytest.fixture(scope="session")
def viton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six drawn scenes to train on and two to test, as files."""
    folder = tmp_path_factory.mktemp("viton")
    write_viton_hd(folder, train=6, test=2)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untrained tiny model in diffusers layout."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    TINY.build(seed=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def recipe(tiny: Path, viton: Path) -> Callable[..., Recipe]:
    """Makes a recipe of a few steps; arguments replace numbers of the schedule or the denoiser."""

    def make(*, seed: int = 0, denoiser: dict[str, object] | None = None, **schedule: object):
        plan = Optimisation(steps=6, batch=2, warmup=2, ema=(0.5, 0.9))
        stage = Denoiser(optimisation=replace(plan, **schedule), noisy=0.5, outside=0.25, inside=1)
        return Recipe(
            model=str(tiny),
            data=str(viton),
            denoiser=replace(stage, **(denoiser or {})),
            seed=seed,
        )

    return make
