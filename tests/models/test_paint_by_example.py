"""Paint-by-Example against diffusers' own, deprecated pipeline, and what is ours alone."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from transformers import CLIPVisionConfig

from i2am.models import PaintByExampleImageEncoder, PaintByExamplePipeline

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(
        **BETAS, clip_sample=False, steps_offset=1, set_alpha_to_one=False
    ),
    "pndm": lambda: PNDMScheduler(
        **BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False
    ),
}


def test_encoder_equals_diffusers(paint_by_example, theirs) -> None:
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, ours_unconditional = paint_by_example.image_encoder(pixels)
        expected, unconditional = theirs().image_encoder(pixels, return_uncond_vector=True)
    assert ours.shape == ours_unconditional.shape == (3, 1, 24)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert torch.equal(ours_unconditional[:1], unconditional)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("size", [(32, 24), (40, 56)], ids=["32x24", "40x56"])
def test_latents_equal_diffusers(
    paint_by_example, theirs, picture, hole, run, scheduler, guidance_scale, size
) -> None:
    one = {"image": picture(1, *size), "mask_image": hole(*size)}
    paint_by_example.scheduler = SCHEDULERS[scheduler]()
    settings = {
        **one,
        "height": size[0],
        "width": size[1],
        "guidance_scale": guidance_scale,
        "num_inference_steps": 4,
    }
    example = picture(2, 20, 20)
    expected = run(theirs(SCHEDULERS[scheduler]()), **settings, example_image=example)
    ours = run(paint_by_example, **settings, reference_image=example)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_a_batch_equals_diffusers(
    paint_by_example, theirs, batch_inputs, run, guidance_scale
) -> None:
    two = {name: values[:2] for name, values in batch_inputs.items()}
    example = two.pop("reference_image")
    settings = {**two, "guidance_scale": guidance_scale, "seeds": (3, 4)}
    pixels = paint_by_example.reference_pixels(example)
    expected = run(theirs(), **settings, example_image=pixels)
    ours = run(paint_by_example, **settings, example_image=example)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_images_equal_diffusers(paint_by_example, theirs, inputs, run) -> None:
    example = inputs.pop("reference_image")
    images = [
        run(pipe, **inputs, example_image=example, output_type="np")
        for pipe in (paint_by_example, theirs())
    ]
    np.testing.assert_allclose(images[0], images[1], atol=1e-4)


def test_unet_sees_noise_masked_image_and_keep_mask(
    paint_by_example, inputs, run, unet_calls
) -> None:
    calls = unet_calls(paint_by_example)
    start = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(1))
    run(paint_by_example, **inputs, latents=start, guidance_scale=1.0, vae_posterior="mode")
    sample = calls[0][0]
    person = torch.from_numpy(np.array(inputs["image"])).movedim(-1, 0) / 127.5 - 1
    keep = (torch.from_numpy(np.array(inputs["mask_image"])) == 0).float()
    with torch.no_grad():
        masked = paint_by_example.vae.encode((person * keep)[None]).latent_dist.mode() * 0.18215
    torch.testing.assert_close(sample[:, :4], start)
    torch.testing.assert_close(sample[:, 4:8], masked, rtol=1e-5, atol=1e-5)
    # the box starts and ends on even pixels: each latent cell is all kept or all generated
    assert torch.equal(sample[0, 8], keep[::2, ::2])


def test_a_mask_edge_inside_a_cell_is_soft(paint_by_example, inputs, run, unet_calls) -> None:
    calls = unet_calls(paint_by_example)
    mask = torch.zeros(32, 24)
    mask[9:, :] = 1
    run(paint_by_example, **{**inputs, "mask_image": mask}, num_inference_steps=1)
    assert calls[0][0][0, 8, :, 0].tolist() == [1.0] * 4 + [0.5] + [0.0] * 11


def test_reference_is_squashed_and_normalised_as_clips(paint_by_example, theirs, picture) -> None:
    square = picture(5, 40, 40)
    theirs_pixels = theirs().feature_extractor(images=square, return_tensors="pt").pixel_values
    ours = paint_by_example.reference_pixels(square)
    torch.testing.assert_close(ours, theirs_pixels, rtol=0, atol=1e-5)
    # an array is resized in floating point, PIL images in 8 bits
    from_array = paint_by_example.reference_pixels(np.array(square))
    torch.testing.assert_close(from_array, ours, rtol=0, atol=0.02)
    assert paint_by_example.reference_pixels(picture(5, 12, 50)).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("photo", "expected"),
    [
        ((32, 24), (32, 24)),
        ((31, 21), (30, 20)),
        ((320, 240), (32, 24)),
        ((24 * 7, 32 * 7), (24, 32)),
        ((300, 300), (26, 26)),
        ((1, 3), (2, 2)),
        ((1, 5000), (2, 1958)),
    ],
    ids=lambda size: "x".join(map(str, size)),
)
def test_default_size_keeps_shape_and_the_unets_area(paint_by_example, photo, expected) -> None:
    # the UNet is made for 16 x 12 cells of 2 pixels
    assert paint_by_example.default_size(np.zeros((*photo, 3), np.uint8)) == expected


def test_a_phone_photo_becomes_a_run_of_the_published_size(paint_by_example) -> None:
    paint_by_example.unet.register_to_config(sample_size=64)
    paint_by_example.vae.register_to_config(block_out_channels=(8,) * 4)
    photo = torch.zeros(()).expand(3, 4000, 3000)
    assert paint_by_example.default_size(photo) == (584, 440)


def test_without_a_size_the_default_is_run(paint_by_example, inputs, picture, hole, run) -> None:
    large = {**inputs, "image": picture(1, 65, 49), "mask_image": hole(65, 49)}
    assert run(paint_by_example, **large).shape[-2:] == (15, 12)
    mixed = {**inputs, "image": [picture(1), picture(1, 36, 28)]}
    with pytest.raises(ValueError, match=r"all images of image must have the same size, got \["):
        paint_by_example(**mixed)
    paint_by_example.unet.register_to_config(sample_size=None)
    with pytest.raises(
        ValueError, match=r"height and width must be given for a unet .* got sample_size None"
    ):
        paint_by_example(**inputs)


def test_example_image_is_another_name(paint_by_example, inputs, run) -> None:
    expected = run(paint_by_example, **inputs)
    example = inputs.pop("reference_image")
    assert torch.equal(run(paint_by_example, **inputs, example_image=example), expected)
    with pytest.raises(ValueError, match="give reference_image or example_image"):
        paint_by_example(**inputs, reference_image=example, example_image=example)


def test_round_trip(paint_by_example, inputs, run, tmp_path) -> None:
    paint_by_example.save_pretrained(tmp_path)
    loaded = PaintByExamplePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(run(loaded, **inputs), run(paint_by_example, **inputs))
    half = PaintByExamplePipeline.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert half.image_encoder.dtype == half.unet.dtype == torch.float16


def test_full_size_encoder_has_the_published_tensors() -> None:
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
        projection_dim=768,
    )
    with torch.device("meta"):
        encoder = PaintByExampleImageEncoder(config)
    shapes = {name: tuple(values.shape) for name, values in encoder.state_dict().items()}
    groups = [name.split(".")[0] for name in shapes]
    counts = {group: groups.count(group) for group in dict.fromkeys(groups)}
    assert counts == {
        "uncond_vector": 1,
        "model": 391,
        "mapper": 80,
        "final_layer_norm": 2,
        "proj_out": 2,
    }
    assert shapes["uncond_vector"] == (1, 1, 768)
    assert shapes["proj_out.weight"] == (768, 1024)
    assert shapes["mapper.blocks.4.attn1.to_q.bias"] == (1024,)
    assert shapes["mapper.blocks.4.ff.net.0.proj.weight"] == (4096, 1024)
