"""The pocket model's autoencoder: AutoencoderKL's interface, and a place in a pipeline's folder."""

import json

import pytest
import torch
from diffusers import AutoencoderKL

from i2am.models import CustomPipeline, load_pipeline
from i2am.models.pocket import POCKET
from i2am.models.pocket_autoencoder import PocketAutoencoder


@pytest.fixture
def vae() -> PocketAutoencoder:
    torch.manual_seed(0)
    return PocketAutoencoder(width=8, fine_width=8).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_the_interface_of_autoencoder_kl(vae, images) -> None:
    posterior = vae.encode(images).latent_dist
    assert posterior.parameters.shape == (2, 8, 8, 6)
    assert torch.equal(vae.encode(images, return_dict=False)[0].mode(), posterior.mode())
    restored = vae.decode(posterior.mode()).sample
    assert restored.shape == images.shape
    assert torch.equal(vae.decode(posterior.mode(), return_dict=False)[0], restored)
    # the types too: pipelines of diffusers look at them
    theirs = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    assert type(theirs.encode(images).latent_dist) is type(posterior)
    assert type(theirs.encode(images)) is type(vae.encode(images))


@torch.no_grad()
def test_pixels_stay_where_they_are(vae, images) -> None:
    # one pixel reaches only the cells around it: fields of the encoder's 3 x 3 convolutions
    other = images.clone()
    other[:, :, 0, 0] += 0.5
    changed = (vae.encode(other).latent_dist.mode() != vae.encode(images).latent_dist.mode()).any(1)
    assert changed[:, 0, 0].all()
    assert not changed[:, :, 5:].any()


@pytest.mark.parametrize("side", [30, 34])
def test_sides_must_be_multiples_of_four(vae, side) -> None:
    with pytest.raises(RuntimeError, match="divisible by downscale_factor"):
        vae.encode(torch.zeros(1, 3, 32, side))


def test_a_folder_keeps_its_class(tmp_path) -> None:
    pipeline = POCKET.build(seed=3)
    pipeline.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    assert isinstance(loaded, CustomPipeline)
    assert isinstance(loaded.vae, PocketAutoencoder)
    assert loaded.vae_scale_factor == 4
    state, other = pipeline.vae.state_dict(), loaded.vae.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["vae"][1] = "AutoencoderTiny"
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    message = "must be a AutoencoderKL or a PocketAutoencoder, .* declares a AutoencoderTiny"
    with pytest.raises(ValueError, match=message):
        load_pipeline(tmp_path)
