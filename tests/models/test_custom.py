"""The custom model: inputs of the UNet, reference tokens, sizes, full-size shapes, round trip."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from i2am.models import FULL_SIZE, CustomModelDDIMScheduler, CustomPipeline, ReferenceProjection


def encoded(pipeline, image):
    """Mode latents of one image ``[3, h, w]``."""
    with torch.no_grad():
        return pipeline.vae.encode(image[None]).latent_dist.mode() * 0.18215


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).movedim(-1, 0) / 127.5 - 1


def test_unet_sees_noise_agnostic_and_pose(custom, inputs, picture, run, unet_calls) -> None:
    calls = unet_calls(custom)
    pose = picture(9)
    start = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(1))
    run(
        custom,
        **inputs,
        pose_image=pose,
        latents=start,
        guidance_scale=1.0,
        vae_posterior="mode",
    )
    person = to_tensor(inputs["image"])
    hole = torch.from_numpy(np.array(inputs["mask_image"]) > 127)
    grey = torch.where(hole, torch.zeros(()), person)
    expected = torch.cat([start, encoded(custom, grey), encoded(custom, to_tensor(pose))], dim=1)
    torch.testing.assert_close(calls[0][0], expected, rtol=1e-5, atol=1e-5)


def test_no_pose_is_a_black_pose(custom, inputs, run) -> None:
    black = Image.new("RGB", (24, 32))
    assert torch.equal(run(custom, **inputs), run(custom, **inputs, pose_image=black))


def test_a_ready_agnostic_image_replaces_image_and_mask(custom, inputs, run) -> None:
    person = to_tensor(inputs["image"])
    agnostic = person * (torch.from_numpy(np.array(inputs["mask_image"])) == 0)
    reference = inputs["reference_image"]
    with pytest.warns(FutureWarning, match="agnostic_image holds negative values"):
        ready = run(custom, agnostic_image=agnostic, reference_image=reference)
    assert torch.equal(ready, run(custom, **inputs))


def test_a_batch_is_pasted_back_beside_an_agnostic_image(
    custom, batch_inputs, picture, run
) -> None:
    two = {name: values[:2] for name, values in batch_inputs.items()}
    settings = {"paste_back": True, "output_type": "np", "seeds": (3, 4)}
    images = run(custom, **two, agnostic_image=picture(8), **settings)
    for made, image, mask in zip(images, two["image"], two["mask_image"], strict=True):
        keep = np.array(mask) == 0
        np.testing.assert_allclose(made[keep], np.array(image)[keep] / 255, atol=1e-6)


def test_posterior_noise_is_drawn_after_the_start(custom, inputs, run, unet_calls) -> None:
    calls = unet_calls(custom)
    run(custom, **inputs, seeds=4, guidance_scale=1.0)
    generator = torch.Generator().manual_seed(4)
    start, first, second = (torch.randn(1, 4, 16, 12, generator=generator) for _ in range(3))
    person = to_tensor(inputs["image"])
    agnostic = person * (torch.from_numpy(np.array(inputs["mask_image"])) == 0)
    expected = [start]
    for image, noise in ((agnostic, first), (-torch.ones_like(person), second)):
        with torch.no_grad():
            posterior = custom.vae.encode(image[None]).latent_dist
        expected.append((posterior.mean + posterior.std * noise) * 0.18215)
    torch.testing.assert_close(calls[0][0], torch.cat(expected, dim=1), rtol=1e-5, atol=1e-5)


def test_context_is_every_normed_token_through_the_projection(custom, picture) -> None:
    reference = to_tensor(picture(3, 40, 22))
    context, unconditional = custom.encode_reference([reference])
    assert context.shape == unconditional.shape == (1, 13, 24)
    assert torch.equal(unconditional[0], custom.image_proj.uncond_vector[0])
    # the published preprocessing: antialiased bilinear, values stay in [-1, 1]
    pixels = F.interpolate(
        reference[None], (16, 12), mode="bilinear", align_corners=False, antialias=True
    )
    tokens = custom.image_encoder(pixels).last_hidden_state
    norm = custom.image_encoder.layernorm
    hidden = F.layer_norm(tokens, (32,), custom.image_proj.norm_in.weight)
    for block in custom.image_proj.blocks:
        hidden = block(hidden)
    torch.testing.assert_close(context, custom.image_proj.proj(hidden))
    torch.testing.assert_close(tokens.mean(-1), norm.bias.mean().expand(1, 13), rtol=0, atol=1e-5)


def test_tokens_are_the_class_token_and_the_patches_row_by_row(custom) -> None:
    reference = torch.zeros(3, 16, 12)
    changed = reference.clone()
    changed[:, 4:8, 8:12] = 1.0  # patch row 1, column 2
    embed = custom.image_encoder.embeddings
    difference = (embed(reference[None]) - embed(changed[None])).abs().sum(-1)[0]
    assert custom.reference_grid == (4, 3)
    assert difference.nonzero().flatten().tolist() == [1 + 1 * 3 + 2]


def test_every_reference_patch_reaches_the_image(custom, inputs, run) -> None:
    reference = (to_tensor(inputs["reference_image"].resize((12, 16))) + 1) / 2
    plain = run(custom, **{**inputs, "reference_image": reference})
    for row, column in ((0, 0), (1, 2), (3, 1)):
        painted = reference.clone()
        painted[:, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] = 0
        assert not torch.equal(run(custom, **{**inputs, "reference_image": painted}), plain)


def test_default_size_is_the_configured_one(custom, inputs, run) -> None:
    assert custom.default_size() == (32, 24)
    image = inputs["image"].resize((50, 70))
    mask = inputs["mask_image"].resize((50, 70))
    assert run(custom, **{**inputs, "image": image, "mask_image": mask}).shape[-2:] == (16, 12)


def test_round_trip(custom, inputs, run, tmp_path) -> None:
    custom.scheduler = CustomModelDDIMScheduler.from_config(custom.scheduler.config)
    custom.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = CustomPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is CustomModelDDIMScheduler
    assert loaded.reference_size == (16, 12)
    assert loaded.trained is False
    assert not any(module.training for module in (loaded.unet, loaded.image_encoder, loaded.vae))
    assert torch.equal(loaded.image_proj.uncond_vector, custom.image_proj.uncond_vector)
    assert torch.equal(run(loaded, **inputs), run(custom, **inputs))
    half = CustomPipeline.from_pretrained(tmp_path, torch_dtype=torch.float16)
    dtypes = {module.dtype for module in (half.unet, half.vae, half.image_proj, half.image_encoder)}
    assert dtypes == {torch.float16}


def test_from_pretrained_takes_ready_components_and_options(custom, tmp_path) -> None:
    custom.save_pretrained(tmp_path)
    loaded = CustomPipeline.from_pretrained(tmp_path, unet=custom.unet, trained=True)
    assert loaded.unet is custom.unet
    assert loaded.trained


def test_one_seed_one_set_of_weights(custom) -> None:
    before = torch.random.get_rng_state()
    builds = [CONFIGURATION.build(seed) for seed in (5, 5, 6)]
    assert torch.equal(torch.random.get_rng_state(), before)
    first, second, other = (build.unet.conv_in.weight for build in builds)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_full_size_has_the_published_shapes() -> None:
    with torch.device("meta"):
        full = FULL_SIZE.build()
    assert len(full.unet.state_dict()) == 686
    assert full.unet.conv_in.weight.shape == (320, 12, 3, 3)
    # 655 published tensors less uncond_vector, whose self-attention q, k, v are fused into one
    assert len(full.image_encoder.state_dict()) == 807
    assert len(full.vae.state_dict()) == 248
    projection = full.image_proj.state_dict()
    assert projection["uncond_vector"].shape == (1, 1037, 768)
    assert projection["blocks.2.ff.net.0.proj.weight"].shape == (12288, 1536)
    sizes = sum(x.numel() for name, x in projection.items() if name != "uncond_vector")
    assert round(sizes / 1e6, 1) == 114.5
    assert full.reference_grid == (37, 28)
    assert full.default_size() == (512, 384)
    heads = full.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.heads
    assert heads == 8
    layout = [name for name, _ in full.unet.named_modules() if name.endswith("attn2")]
    assert len(layout) == 16


@pytest.mark.parametrize(
    ("reference_size", "message"),
    [
        (16, "reference_size must be a height and a width in pixels, got 16"),
        ((-16, -12), r"reference_size must be a height and a width in pixels, got \(-16, -12\)"),
        ((16, 10), r"multiple of the encoder's patches of 4 pixels, got \[16, 10\]"),
        ((16, 16), r"reference_size \[16, 16\] gives 17 tokens, image_proj is made for 13"),
    ],
)
def test_reference_sizes_that_do_not_fit_are_refused(custom, reference_size, message) -> None:
    with pytest.raises(ValueError, match=message):
        CustomPipeline(**custom.components, reference_size=reference_size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_image": None}, "mask_image must be given together with image"),
        (
            {"image": None, "mask_image": None},
            "image and mask_image, or agnostic_image, must be given",
        ),
        (
            {"image": None, "mask_image": None, "agnostic_image": "ready", "paste_back": True},
            "paste_back needs image and mask_image, got None",
        ),
        (
            {"mask_image": None, "agnostic_image": "ready", "paste_back": True},
            "mask_image must be given together with image, got None",
        ),
        (
            {"agnostic_image": "ready"},
            "^image and mask_image must not be given with agnostic_image, .* only paste_back needs",
        ),
        (
            {"image": None, "agnostic_image": "ready"},
            "^mask_image must not be given with agnostic_image",
        ),
        (
            {"mask_image": None, "agnostic_image": "ready"},
            "^image must not be given with agnostic_image",
        ),
        (
            {"image": "three", "agnostic_image": "two", "paste_back": True},
            "agnostic_image must hold 1 image or 3, as many as image, got 2",
        ),
        (
            {"image": None, "mask_image": None, "agnostic_image": "two", "pose_image": "three"},
            "agnostic_image must hold 1 image or 3, as many as pose_image, got 2",
        ),
        ({"pose_image": np.zeros((32, 24, 2))}, r"pose_image must have shape \[height, width, 3\]"),
    ],
    ids=[
        "no mask",
        "nothing",
        "paste back",
        "paste back without mask",
        "both",
        "mask beside agnostic",
        "image beside agnostic",
        "paste back counts",
        "agnostic count",
        "pose",
    ],
)
def test_bad_input(custom, inputs, picture, change, message) -> None:
    pictures = {"ready": picture(8), "two": [picture(8)] * 2, "three": [picture(8)] * 3}
    change = {
        name: pictures[value] if isinstance(value, str) else value for name, value in change.items()
    }
    with pytest.raises(ValueError, match=message):
        custom(**{**inputs, **change})


def test_projection_refuses_another_number_of_tokens() -> None:
    projection = ReferenceProjection(width=8, context_width=8, tokens=5, layers=1)
    with pytest.raises(ValueError, match="tokens must hold 5 tokens per reference image, got 4"):
        projection(torch.zeros(1, 4, 8))


CONFIGURATION = replace(
    FULL_SIZE,
    vae={**FULL_SIZE.vae, "block_out_channels": (32,) * 4},
    image_encoder={
        **FULL_SIZE.image_encoder,
        "hidden_size": 24,
        "num_hidden_layers": 1,
    },
    image_proj={**FULL_SIZE.image_proj, "width": 24, "context_width": 16},
    unet={
        **FULL_SIZE.unet,
        "block_out_channels": (32,) * 4,
        "layers_per_block": 1,
        "cross_attention_dim": 16,
    },
)
