"""The custom model at pocket size: 128 x 96 images, about four million parameters, no download."""

import json
import os
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from safetensors.torch import save
from torch import nn

from i2am.files import parse_json, write
from i2am.models.configuration import STABLE_DIFFUSION_BETAS, CustomConfiguration
from i2am.models.custom import CustomPipeline
from i2am.models.pocket_autoencoder import PocketAutoencoder
from i2am.models.weights import load_strictly, read_weight_file

POCKET = CustomConfiguration(
    # 4 times smaller along each side, 32 x 24 latents
    vae={
        "latent_channels": 4,
        "width": 64,
        "fine_width": 48,
        "encoder_blocks": 2,
        "decoder_blocks": 3,
        "fine_blocks": 3,
    },
    vae_class=PocketAutoencoder,
    # 16 x 12 patches and the class token: 193 tokens
    image_encoder={
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "mlp_ratio": 4,
        "image_size": 128,
        "patch_size": 8,
    },
    image_proj={"width": 96, "context_width": 96, "tokens": 193, "layers": 1},
    # cross-attention at 16 x 12 only: at 8 x 6 heads gather what holds for the whole garment, and
    # let every query look at one token of it
    unet={
        "sample_size": (32, 24),
        "in_channels": 12,
        "out_channels": 4,
        "block_out_channels": (32, 80, 128),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 96,
        "attention_head_dim": 4,  # diffusers' old name for the number of heads
        "norm_num_groups": 16,
    },
    scheduler=DDIMScheduler,
    scheduler_options={
        **STABLE_DIFFUSION_BETAS,
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "prediction_type": "v_prediction",
    },
    reference_size=(128, 96),
)

MODULES = ("vae", "image_encoder", "image_proj", "unet")
SETTINGS = "i2am_pocket"


def pocket_weights() -> Path | None:
    """The weights that come with the package, or None where it has none."""
    path = Path(__file__).with_name("pocket.safetensors")
    return path if path.is_file() else None


def pocket_pipeline(seed: int = 0, weights: str | os.PathLike[str] | None = None) -> CustomPipeline:
    """The pocket model with the package's weights where it has any, else with random ones.

    ``POCKET.build(seed)`` always has random weights.

    Args:
        seed: Seed of the random weights.
        weights: A file of `save_pocket_weights` instead of the package's.

    Returns:
        A pipeline whose `trained` says whether the weights came from a file.

    Raises:
        FileNotFoundError: `weights` does not exist.
        ValueError: The file is damaged, or its tensors do not fit.
    """
    pipeline = POCKET.build(seed)
    path = pocket_weights() if weights is None else Path(weights)
    if path is None:
        return pipeline
    state, metadata = read_weight_file(path)
    state = {name: values.float() for name, values in state.items()}
    load_strictly(
        nn.ModuleDict({name: pipeline.components[name] for name in MODULES}),
        state,
        what=f"pocket model in {path}",
    )
    settings = parse_json(metadata.get(SETTINGS, "{}"), f"{SETTINGS} in {path}")
    pipeline.vae.register_to_config(**settings.get("vae", {}))
    pipeline.scheduler = type(pipeline.scheduler).from_config(
        pipeline.scheduler.config, **settings.get("scheduler", {})
    )
    pipeline.register_to_config(trained=True)
    return pipeline


def save_pocket_weights(
    pipeline: CustomPipeline,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Writes one safetensors file that `pocket_pipeline` reads.

    Besides the tensors of all networks it holds the settings that training decides: the scale and
    shift of the latents, and what the UNet predicts.
    """
    state = {
        f"{name}.{key}": values.to(dtype).contiguous()
        for name in MODULES
        for key, values in pipeline.components[name].state_dict().items()
    }
    settings = {
        "vae": {name: pipeline.vae.config[name] for name in ("scaling_factor", "shift_factor")},
        "scheduler": {"prediction_type": pipeline.scheduler.config.prediction_type},
    }
    write(Path(path), save(state, metadata={SETTINGS: json.dumps(settings)}))
