"""Tiny pipelines with random weights, and inputs for them; everything offline and in seconds."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPVisionConfig

from i2am.models import (
    CustomConfiguration,
    CustomPipeline,
    DCIVTONPipeline,
    PaintByExamplePipeline,
    StableVITONPipeline,
    StableVITONUNet,
)
from i2am.models.configuration import STABLE_DIFFUSION_BETAS

DDIM_OPTIONS = {**STABLE_DIFFUSION_BETAS, "steps_offset": 1, "set_alpha_to_one": False}

TINY_UNET = {
    "sample_size": (16, 12),
    "out_channels": 4,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
# six warp blocks, number 4 of the published maps among them
TINY_STABLEVITON = {
    "sample_size": (16, 12),
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
TINY_VAE = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
TINY_CUSTOM = CustomConfiguration(
    vae=TINY_VAE,
    image_encoder={
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "mlp_ratio": 1,
        "image_size": 16,
        "patch_size": 4,
    },
    image_proj={"width": 32, "context_width": 24, "tokens": 13, "layers": 2},
    unet={**TINY_UNET, "in_channels": 12},
    scheduler=DDIMScheduler,
    scheduler_options=DDIM_OPTIONS,
    reference_size=(16, 12),
)
TINY_CLIP = {
    "hidden_size": 32,
    "projection_dim": 24,
    "intermediate_size": 37,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,  # (4 + 1) // 5 = 1 mapper block
    "image_size": 16,
    "patch_size": 4,
}


@pytest.fixture(scope="session")
def _custom() -> CustomPipeline:
    pipeline = TINY_CUSTOM.build(seed=0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def custom(_custom: CustomPipeline) -> CustomPipeline:
    return copy.deepcopy(_custom)


@pytest.fixture(scope="session")
def public_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that diffusers' own Paint-by-Example pipeline wrote."""
    folder = tmp_path_factory.mktemp("paint_by_example")
    diffusers_pipeline().save_pretrained(folder)
    return folder


def diffusers_pipeline(scheduler: Any = None) -> Any:
    """diffusers' Paint-by-Example pipeline, tiny, always with the same weights."""
    from diffusers import PaintByExamplePipeline as TheirPipeline
    from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder
    from transformers import CLIPImageProcessorPil

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        modules = {
            "vae": AutoencoderKL(**TINY_VAE),
            "image_encoder": PaintByExampleImageEncoder(CLIPVisionConfig(**TINY_CLIP)),
            "unet": UNet2DConditionModel(**{**TINY_UNET, "in_channels": 9}),
        }
    side = TINY_CLIP["image_size"]
    pipeline = TheirPipeline(
        **{name: module.eval() for name, module in modules.items()},
        scheduler=scheduler or DDIMScheduler(**DDIM_OPTIONS),
        safety_checker=None,
        feature_extractor=CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def theirs() -> Callable[..., Any]:
    """Makes diffusers' pipeline with the weights of `public_folder`, with a given scheduler."""
    return diffusers_pipeline


@pytest.fixture(scope="session")
def _paint_by_example(public_folder: Path) -> PaintByExamplePipeline:
    pipeline = PaintByExamplePipeline.from_pretrained(public_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def paint_by_example(_paint_by_example: PaintByExamplePipeline) -> PaintByExamplePipeline:
    return copy.deepcopy(_paint_by_example)


@pytest.fixture
def dci_vton(paint_by_example: PaintByExamplePipeline) -> DCIVTONPipeline:
    """The same networks."""
    pipeline = DCIVTONPipeline(**paint_by_example.components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def stableviton_unet() -> StableVITONUNet:
    """Random numbers everywhere, also where training begins with zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        unet = StableVITONUNet(**TINY_STABLEVITON).eval()
        for parameter in unet.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return unet


@pytest.fixture
def stableviton(
    paint_by_example: PaintByExamplePipeline, stableviton_unet: StableVITONUNet
) -> StableVITONPipeline:
    components = {**paint_by_example.components, "unet": copy.deepcopy(stableviton_unet)}
    pipeline = StableVITONPipeline(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(params=["custom", "paint_by_example"])
def pipeline(request: pytest.FixtureRequest) -> Any:
    """Either pipeline that starts from noise: what both must do."""
    return request.getfixturevalue(request.param)


def picture(seed: int, height: int = 32, width: int = 24) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def hole(height: int = 32, width: int = 24, top: int = 8, left: int = 4) -> Image.Image:
    """A mask whose white box starts and ends on even pixels, so that every resampling agrees."""
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[top : height - 4, left : width - 8] = 255
    return Image.fromarray(mask)


@pytest.fixture
def inputs() -> dict[str, Any]:
    """Image, mask and reference of one sample."""
    return {"image": picture(1), "mask_image": hole(), "reference_image": picture(2, 20, 20)}


@pytest.fixture
def batch_inputs() -> dict[str, Any]:
    """Three different samples."""
    return {
        "image": [picture(seed) for seed in (1, 2, 3)],
        "mask_image": [hole(top=top) for top in (4, 8, 12)],
        "reference_image": [picture(seed, 20, 20) for seed in (4, 5, 6)],
    }


@pytest.fixture
def unet_calls() -> Callable[[Any], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Starts listing (sample, encoder_hidden_states) of every UNet call of a pipeline."""

    def watch(pipeline: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        calls: list[tuple[torch.Tensor, torch.Tensor]] = []

        def note(_: Any, args: Any, kwargs: Any) -> None:
            calls.append((args[0].clone(), kwargs["encoder_hidden_states"].clone()))

        pipeline.unet.register_forward_pre_hook(note, with_kwargs=True)
        return calls

    return watch


@pytest.fixture(name="picture")
def picture_maker() -> Callable[..., Image.Image]:
    """Random pictures by seed, height and width."""
    return picture


@pytest.fixture(name="hole")
def hole_maker() -> Callable[..., Image.Image]:
    """Masks by height, width and the corner of their white box."""
    return hole


@pytest.fixture
def run() -> Callable[..., torch.Tensor]:
    """Runs a pipeline on the CPU for a few steps and returns latents; `seeds` one per sample."""

    def run_latents(
        pipeline: Any, *, seeds: tuple[int, ...] | int = 0, **arguments: Any
    ) -> torch.Tensor:
        if isinstance(seeds, int):
            generator: Any = torch.Generator().manual_seed(seeds)
        else:
            generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        settings = {"num_inference_steps": 3, "output_type": "latent", "generator": generator}
        return pipeline(**{**settings, **arguments}).images

    return run_latents
