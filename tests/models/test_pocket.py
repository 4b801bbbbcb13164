"""The built-in pocket model: sizes, determinism, weight files, maps that are not constant."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from i2am.models import POCKET, pocket, pocket_pipeline, pocket_weights, save_pocket_weights


@pytest.fixture(scope="module")
def untrained():
    pipeline = POCKET.build(seed=0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def scene():
    """A person with a box to fill and a striped garment, of sizes a photograph might have."""
    ramp = np.linspace(0, 255, 160)[:, None, None] * np.ones((160, 120, 3))
    person = Image.fromarray(ramp.astype(np.uint8))
    mask = np.zeros((160, 120), np.uint8)
    mask[50:120, 30:90] = 255
    garment = np.zeros((90, 90, 3), np.uint8)
    garment[20:70, 25:65] = (200, 30, 60)
    garment[20:70:8, 25:65] = 255
    return {
        "image": person,
        "mask_image": Image.fromarray(mask),
        "reference_image": Image.fromarray(garment),
    }


@contextmanager
def watched(pipeline, hook):
    """Calls `hook` before every cross-attention."""
    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True)
        for name, module in pipeline.unet.named_modules()
        if name.endswith("attn2")
    ]
    yield
    for handle in handles:
        handle.remove()


def test_sizes(untrained) -> None:
    assert untrained.default_size() == (128, 96)
    assert untrained.vae_scale_factor == 4
    assert untrained.reference_grid == (16, 12)
    assert untrained.image_proj.config.tokens == 193
    counts = {
        name: sum(x.numel() for x in untrained.components[name].parameters())
        for name in pocket.MODULES
    }
    assert 3e6 < sum(counts.values()) < 4e6
    assert untrained.scheduler.config.timestep_spacing == "leading"


def test_cross_attention_is_at_16x12_only(untrained, scene) -> None:
    queries = []

    def note(_, args, kwargs):
        queries.append((args[0].shape[1], kwargs["encoder_hidden_states"].shape[1]))

    with watched(untrained, note):
        untrained(**scene, num_inference_steps=1)
    assert sorted(queries) == [(192, 193)] * 3
    assert not any(
        name.endswith("attn2") for name, _ in untrained.unet.down_blocks[0].named_modules()
    )


def test_untrained_attention_is_not_constant(untrained, scene) -> None:
    # the maps of random weights mean nothing, but they have to vary: default initialisation only
    shares = []

    def weights(attention, args, kwargs):
        query = attention.head_to_batch_dim(attention.to_q(args[0]))
        key = attention.head_to_batch_dim(attention.to_k(kwargs["encoder_hidden_states"]))
        shares.append(attention.get_attention_scores(query, key))

    with watched(untrained, weights):
        untrained(**scene, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert len(shares) == 2 * 3
    for share in shares:
        over_keys = share.std(dim=-1) / share.mean(dim=-1)
        over_queries = share.std(dim=-2) / share.mean(dim=-2)
        assert over_keys.mean() > 0.02
        assert over_queries.mean() > 0.02


def test_fifty_steps_stay_finite(untrained, scene) -> None:
    image = untrained(
        **scene,
        num_inference_steps=50,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert image.shape == (1, 128, 96, 3)
    assert np.isfinite(image).all()
    assert image.std() > 0.01


def test_without_a_weight_file_the_pipeline_says_it_is_untrained(monkeypatch) -> None:
    monkeypatch.setattr(pocket, "pocket_weights", lambda: None)
    first, second, other = (pocket_pipeline(seed) for seed in (0, 0, 1))
    assert not first.trained
    assert not first.config.trained
    weight = "conv_in.weight"
    assert torch.equal(first.unet.state_dict()[weight], second.unet.state_dict()[weight])
    assert not torch.equal(first.unet.state_dict()[weight], other.unet.state_dict()[weight])


def test_package_weights_are_used_where_they_exist() -> None:
    assert pocket_pipeline().trained is (pocket_weights() is not None)


def test_weight_file_round_trip(tmp_path, scene) -> None:
    source = POCKET.build(seed=3)
    source.vae.register_to_config(scaling_factor=0.7, shift_factor=0.1)
    source.scheduler.register_to_config(prediction_type="epsilon")
    path = tmp_path / "weights.safetensors"
    save_pocket_weights(source, path, dtype=torch.float32)
    loaded = pocket_pipeline(weights=path)
    assert loaded.trained
    assert loaded.vae.config.scaling_factor == 0.7
    assert loaded.scheduler.config.prediction_type == "epsilon"
    images = [
        pipe(
            **scene,
            num_inference_steps=2,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images
        for pipe in (source, loaded)
    ]
    assert torch.equal(*images)
    save_pocket_weights(source, path)
    assert path.stat().st_size < 8e6
    assert {values.dtype for values in load_file(path).values()} == {torch.float16}
    assert pocket_pipeline(weights=path).unet.dtype == torch.float32


def test_weight_files_that_do_not_fit_are_refused(tmp_path, untrained) -> None:
    path = tmp_path / "weights.safetensors"
    with pytest.raises(FileNotFoundError, match=r"weights.safetensors is missing"):
        pocket_pipeline(weights=path)
    save_pocket_weights(untrained, path)
    # copies, for load_file maps the very file that is written
    state = {name: values.clone() for name, values in load_file(path).items()}
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"weights\.safetensors is truncated"):
        pocket_pipeline(weights=path)
    del state["unet.conv_in.bias"]
    state["unet.extra"] = torch.zeros(1)
    state["vae.quant_conv.bias"] = torch.zeros(3)
    save_file(state, path, metadata={"i2am_pocket": json.dumps({})})
    message = (
        r"missing: 1 tensor, unet.conv_in.bias; unexpected: 1 tensor, unet.extra; "
        r"misshapen: 1 tensor, vae.quant_conv.bias \(\[3\] for \[8\]\)"
    )
    with pytest.raises(ValueError, match=message):
        pocket_pipeline(weights=path)
