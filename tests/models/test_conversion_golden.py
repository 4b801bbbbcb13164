"""Full-size checkpoints, converted, compute what the original modules do with the same weights.

The networks under test have their published sizes and golden weights; the rest of each checkpoint
is a narrow stand-in, which the conversion takes as well. See tests/golden/checkpoints/README.md.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import i2am
from i2am.layouts import TokenLayout
from i2am.models import load_pipeline
from i2am.models.conversion import convert

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "checkpoints"
MEMORY, DISK = 12e9, 12e9
# what is published at full size below, by the beginning of names
FULL = {
    "paint-by-example": ("model.", "cond_stage_model.", "learnable_vector", "proj_out."),
    "stableviton": ("model.", "control_model."),
    "custom": ("diffusion.", "mlp."),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < MEMORY,
        reason=f"full-size models need {MEMORY / 1e9:.0f} GB of memory",
    ),
]


@pytest.fixture(scope="module")
def converted(tmp_path_factory, published_keys, tiny_keys, synthetic):
    """Writes a checkpoint as its authors would, converts it and loads the folder."""
    folders = []

    def build(system):
        keys = {
            **tiny_keys(system),
            **{
                key: entry
                for key, entry in published_keys(system).items()
                if key.startswith(FULL[system])
            },
        }
        if system == "custom":
            # the encoder's positions decide how the projection's 1037 tokens are arranged
            shape, kind = keys["dinov2.model.pos_embed"]
            keys["dinov2.model.pos_embed"] = ((shape[0], 1370, shape[2]), kind)
        if system == "stableviton":
            # the token is as wide as the full-size UNet's context
            keys["learnable_vector"] = published_keys(system)["learnable_vector"]
            keys["proj_out.weight"] = ((768, keys["proj_out.weight"][0][1]), "matrix")
            keys["proj_out.bias"] = published_keys(system)["proj_out.bias"]
        folder = tmp_path_factory.mktemp(system)
        folders.append(folder)
        if shutil.disk_usage(folder).free < DISK:
            pytest.skip(f"full-size checkpoints need {DISK / 1e9:.0f} GB of disk")
        torch.save({"state_dict": synthetic(keys)}, folder / "published.ckpt")
        convert(folder / "published.ckpt", folder / "model", system=system)
        (folder / "published.ckpt").unlink()
        return load_pipeline(folder / "model")

    yield build
    for folder in folders:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def golden():
    def read(system):
        with np.load(GOLDEN / f"{system}.npz") as file:
            return {name: torch.from_numpy(file[name]) for name in file if name != "unet_layers"}

    return read


@pytest.fixture(scope="module")
def layers():
    """Names of the 15 recorded layers in the order of their golden maps, and the middle block's."""

    def read(system):
        with np.load(GOLDEN / f"{system}.npz") as file:
            names = {name: f"{number:02d}" for number, name in enumerate(file["unet_layers"])}
        return {
            f"{name}.transformer_blocks.0.attn2": number
            for name, number in {**names, "mid_block.attentions.0": "mid"}.items()
        }

    return read


def assert_close(result, expected, *, limit=1e-4):
    """Largest error in units of the expected array's standard deviation."""
    assert result.shape == expected.shape
    error = (result.double() - expected.double()).abs().max() / expected.double().std()
    assert error < limit


def assert_map(result, expected):
    """Largest error in units of the expected map's maximum."""
    assert result.shape == expected.shape
    assert (result - expected).abs().max() < 1e-4 * expected.max()


def recorded(pipe, x, timestep, context, *, layout=None, **hint):
    """Prediction and maps per layer of one call of the UNet; every row is a sample."""
    layout = layout or pipe.attribution_layout()
    options = {"layout": layout, "time_groups": 1, "num_inference_steps": 1}
    with torch.no_grad(), i2am.record(pipe.unet, **options) as recorder:
        eps = pipe.unet(x, timestep, encoder_hidden_states=context, **hint).sample
    return eps, {layer.site.layer: layer for layer in recorder.maps().layer_sums}


@torch.no_grad()
def test_paint_by_example(converted, golden, layers):
    expected = golden("paint-by-example")
    pipe = converted("paint-by-example")
    encoder = pipe.image_encoder

    def project(pooled):
        return encoder.proj_out(encoder.final_layer_norm(encoder.mapper(pooled)))

    assert_close(project(expected["pooled"]), expected["context"], limit=5e-5)
    # with a single token the mapper's queries and keys have no effect
    assert_close(project(expected["tokens"]), expected["tokens_projected"], limit=5e-5)

    inputs = (pipe, expected["x"], expected["timestep"])
    eps, maps = recorded(*inputs, expected["context"])
    assert_close(eps, expected["eps"])
    eps, _ = recorded(*inputs, encoder.uncond_vector.expand(2, -1, -1))
    assert_close(eps, expected["eps_uncond"])

    names = layers("paint-by-example")
    assert set(maps) == set(names)
    for name, number in names.items():
        result = maps[name].reference_to_generated  # [samples, time, heads, votes, h, w]
        assert_map(result[1, 0, :, 0], expected[f"unet_r2g_{number}"])


@torch.no_grad()
def test_stableviton(converted, golden, layers):
    expected = golden("stableviton")
    pipe = converted("stableviton")
    x, timestep, context = (expected[name] for name in ("x", "timestep", "context"))
    hint = expected["hint"]

    time = pipe.unet.get_time_embed(x, timestep)
    features = pipe.unet.spatial_encoder(x, time, context, hint)
    assert len(features) == 13
    for number, feature in enumerate(features):
        std = expected["feature_std"][number]
        found = torch.cat(
            [
                feature.mean()[None],
                feature.std(correction=0)[None],
                feature[0, :4, :2, :2].flatten(),
            ]
        )
        wanted = torch.cat(
            [
                expected["feature_mean"][number][None],
                std[None],
                expected["feature_probe"][number],
            ]
        )
        assert (found - wanted).abs().max() < 1e-4 * std

    layout = pipe.attribution_layout(unet_layers=True)
    eps, maps = recorded(pipe, x, timestep, context, layout=layout, hint=hint)
    assert_close(eps, expected["eps"])
    uncond = pipe.image_encoder.uncond_vector
    eps, default = recorded(pipe, x, timestep, uncond, hint=hint)
    assert_close(eps, expected["eps_uncond"])

    names = layers("stableviton")
    warps = {f"warp_blocks.{number}.transformer_blocks.0.attn2": number for number in range(9)}
    assert set(maps) == {*names, *warps}
    assert set(default) == set(warps)
    for name, number in names.items():
        result = maps[name].reference_to_generated
        assert_map(result[0, 0, :, 0], expected[f"unet_r2g_{number}"])
    for name, number in warps.items():
        layer = maps[name]
        assert_map(layer.reference_to_generated[0, 0, :, 0], expected[f"warp_r2g_{number:02d}"])
        assert_map(layer.generated_to_reference[0, 0, :, 0], expected[f"warp_g2r_{number:02d}"])


@torch.no_grad()
def test_custom(converted, golden, layers):
    expected = golden("custom")
    pipe = converted("custom")
    context, uncond = pipe.image_proj(expected["image_proj_input_times_32"].float() / 32)
    assert_close(context, expected["context"], limit=5e-5)

    inputs = (pipe, expected["x"], expected["timestep"])
    eps, maps = recorded(*inputs, expected["context"])
    assert_close(eps, expected["eps"])
    eps, _ = recorded(*inputs, uncond)
    assert_close(eps, expected["eps_uncond"])

    names = layers("custom")
    assert set(maps) == set(names)
    for name, number in names.items():
        layer = maps[name]
        assert_map(layer.reference_to_generated[0, 0, :, 0], expected[f"r2g_patch_{number}"])
        assert_map(layer.generated_to_reference[0, 0, :, 0], expected[f"g2r_{number}"])

    every_key = TokenLayout.cross_attention((37, 28), prefix=1, prefix_votes=True)
    _, maps = recorded(*inputs, expected["context"], layout=every_key)
    for name, number in names.items():
        result = maps[name].reference_to_generated
        assert_map(result[0, 0, :, 0], expected[f"r2g_all_{number}"])
