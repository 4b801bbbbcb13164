"""Stage 1: whitening changes numbers but no picture, the ratio is that of the textbook."""

import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from i2am.models import POCKET
from i2am.models.pocket_autoencoder import PocketAutoencoder
from i2am.training.autoencoder import AutoencoderStage, psnr, whiten
from i2am.training.recipe import Autoencoder, Optimisation
from i2am.training.scenes import CachedScenes

KL = {
    "block_out_channels": (8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 4,
}


@pytest.fixture(params=[PocketAutoencoder, AutoencoderKL], ids=["pocket", "kl"])
def vae(request):
    torch.manual_seed(0)
    sizes = {"width": 8, "fine_width": 8}
    made = request.param(**(KL if request.param is AutoencoderKL else sizes)).eval()
    with torch.no_grad():
        # channels of different sizes and places, as after a training
        made.quant_conv.weight[:4] *= torch.tensor([3.0, 1, 40, 0.2])[:, None, None, None]
        made.quant_conv.bias[:4] += torch.tensor([5.0, 0, -2, 0.1])
    return made


@torch.no_grad()
def test_whitened_latents_restore_the_same_pictures(vae) -> None:
    pictures = torch.rand(6, 3, 32, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    before = vae.encode(pictures).latent_dist
    restored = vae.decode(before.mode()).sample
    whiten(vae, [pictures[:4], pictures[4:]])
    after = vae.encode(pictures).latent_dist
    latents = after.mode()
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(vae.decode(latents).sample, restored, atol=1e-4, rtol=0)
    # the posterior is as wide beside its latents as it was
    scale = before.mode().std((0, 2, 3))[:, None, None]
    torch.testing.assert_close(after.std, before.std / scale, atol=1e-4, rtol=1e-3)
    assert vae.config.scaling_factor == 1
    assert vae.config.shift_factor is None


def test_whitening_needs_the_convolutions() -> None:
    vae = AutoencoderKL(**KL, use_quant_conv=False, use_post_quant_conv=False)
    with pytest.raises(ValueError, match="vae must have quant_conv and post_quant_conv"):
        whiten(vae, [torch.zeros(1, 3, 32, 24)])


@torch.no_grad()
def test_psnr_of_a_known_error(vae) -> None:
    pictures = torch.full((3, 3, 32, 24), 0.5)
    for values in vae.decoder.parameters():
        values.zero_()
    # the decoder says 0, which is grey .5; an error of .1 everywhere is 20 dB
    assert psnr(vae, pictures + 0.1) == pytest.approx(20, abs=1e-4)
    assert psnr(vae, pictures + 0.25) == pytest.approx(-20 * math.log10(0.25), abs=1e-4)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_few_steps_learn(precision) -> None:
    draws = np.random.default_rng(0)
    flat = draws.integers(0, 256, (8, 3, 1, 1), dtype=np.uint8)
    pictures = np.broadcast_to(flat, (8, 3, 32, 24)).copy()
    scenes = CachedScenes({name: pictures for name in ("image", "garment", "agnostic", "pose")})
    torch.manual_seed(0)
    vae = PocketAutoencoder(width=16, fine_width=8)
    plan = Optimisation(steps=60, batch=4)
    recipe = Autoencoder(optimisation=plan, precision=precision)
    stage = AutoencoderStage(vae, recipe, scenes, scenes.read(range(8)), seed=0, factor=4)
    optimiser = torch.optim.AdamW(stage.module.parameters(), lr=3e-3)
    before = stage.validate(0)
    for step in range(plan.steps):
        loss, numbers = stage.loss(stage.module, step, 0, 0, 1)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert numbers.keys() == {"absolute", "squared", "divergence"}
    with torch.no_grad():
        after = stage.validate(60)
    assert after.keys() == {f"psnr_{kind}" for kind in ("image", "garment", "agnostic", "pose")}
    assert all(after[kind] > before[kind] + 5 for kind in after)


def test_the_same_step_has_the_same_loss() -> None:
    draws = np.random.default_rng(0)
    pictures = draws.integers(0, 256, (8, 3, 32, 24), dtype=np.uint8)
    scenes = CachedScenes({name: pictures for name in ("image", "garment", "agnostic", "pose")})
    losses = []
    for step in (3, 3, 4):
        torch.manual_seed(0)
        vae = PocketAutoencoder(width=8, fine_width=8)
        recipe = Autoencoder(optimisation=Optimisation(steps=9, batch=2))
        stage = AutoencoderStage(vae, recipe, scenes, {}, seed=0, factor=4)
        torch.rand(step)
        losses.append(stage.loss(stage.module, step, 0, 0, 1)[0].item())
    assert losses[0] == losses[1] != losses[2]


def test_the_pocket_models_autoencoder() -> None:
    pipeline = POCKET.build()
    assert isinstance(pipeline.vae, PocketAutoencoder)
    posterior = pipeline.vae.encode(torch.zeros(2, 3, 128, 96)).latent_dist
    assert posterior.mode().shape == (2, 4, 32, 24)
    assert pipeline.vae.decode(posterior.mode(), return_dict=False)[0].shape == (2, 3, 128, 96)
