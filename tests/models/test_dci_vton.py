"""DCI-VTON: what the network sees, where the run starts, what comes back, what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from i2am.models import DCIVTONPipeline, PaintByExamplePipeline, load_pipeline
from i2am.models.crop import crop_to_object

GREY = Image.new("RGB", (24, 32), (128, 128, 128))
WHITE = Image.new("L", (24, 32), 255)


@pytest.fixture
def dressed(inputs, picture) -> dict:
    """The inputs of one run; the garment lies at rows 4 to 19 and columns 2 to 17."""
    mask = np.zeros((32, 24), np.uint8)
    mask[4:20, 2:18] = 255
    return {
        **inputs,
        "warped_image": picture(7),
        "warped_mask_image": Image.fromarray(mask),
    }


def signed(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).movedim(-1, 0)[None] / 127.5 - 1


def white(image: Image.Image) -> torch.Tensor:
    return (torch.from_numpy(np.array(image)) > 127).float()


def composite_of(dressed: dict) -> torch.Tensor:
    """By hand, pixel by pixel."""
    hole, covered = white(dressed["mask_image"]), white(dressed["warped_mask_image"])
    person, garment = signed(dressed["image"]), signed(dressed["warped_image"])
    result = person.clone()
    for row in range(32):
        for column in range(24):
            if hole[row, column]:
                shows = covered[row, column] > 0
                result[..., row, column] = garment[..., row, column] if shows else 0.0
    return result


def latents_of(pipeline: DCIVTONPipeline, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return pipeline.vae.encode(pixels).latent_dist.mode() * 0.18215


def test_unet_sees_the_composite_from_whose_noised_latents_the_run_starts(
    dci_vton, dressed, run, unet_calls
) -> None:
    calls = unet_calls(dci_vton)
    noise = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(1))
    run(dci_vton, **dressed, latents=noise, vae_posterior="mode", num_inference_steps=1)
    assert len(calls) == 1
    sample = calls[0][0]
    assert sample.shape == (1, 9, 16, 12)  # without guidance by default
    latents = latents_of(dci_vton, composite_of(dressed))
    torch.testing.assert_close(sample[:, 4:8], latents, rtol=1e-5, atol=1e-5)
    # the signal left at t = 999, whatever the first timestep
    signal = float(dci_vton.scheduler.alphas_cumprod[999])
    assert signal**0.5 == pytest.approx(0.0683, abs=5e-5)
    start = signal**0.5 * latents + (1 - signal) ** 0.5 * noise
    torch.testing.assert_close(sample[:, :4], start, rtol=1e-5, atol=1e-5)
    keep = 1 - white(dressed["mask_image"])
    assert torch.equal(sample[0, 8], keep[::2, ::2])


def test_a_ready_agnostic_image_lies_below_the_garment(
    dci_vton, dressed, picture, run, unet_calls
) -> None:
    calls = unet_calls(dci_vton)
    agnostic = picture(11)
    run(dci_vton, **dressed, agnostic_image=agnostic, vae_posterior="mode", num_inference_steps=1)
    shows = white(dressed["warped_mask_image"]) * white(dressed["mask_image"])
    pixels = signed(agnostic) * (1 - shows) + signed(dressed["warped_image"]) * shows
    expected = latents_of(dci_vton, pixels)
    torch.testing.assert_close(calls[0][0][:, 4:8], expected, rtol=1e-5, atol=1e-5)


def test_soft_masks_blend(dci_vton, dressed, run, unet_calls) -> None:
    calls = unet_calls(dci_vton)
    soft = white(dressed["warped_mask_image"]) * 0.25
    settings = {"vae_posterior": "mode", "num_inference_steps": 1, "warped_mask_image": soft}
    run(dci_vton, **{**dressed, **settings})
    hole = white(dressed["mask_image"])
    pixels = signed(dressed["image"]) * (1 - hole)
    pixels = pixels * (1 - soft * hole) + signed(dressed["warped_image"]) * soft * hole
    expected = latents_of(dci_vton, pixels)
    torch.testing.assert_close(calls[0][0][:, 4:8], expected, rtol=1e-5, atol=1e-5)


def test_the_person_stays_outside_the_mask_and_in_shape(dci_vton, dressed, picture, hole, run):
    # the UNet is made for 32 x 24; a person of another shape is squashed and comes back in its own
    person, mask = picture(1, 40, 20), hole(40, 20)
    settings = {**dressed, "image": person, "mask_image": mask, "output_type": "np"}
    images = run(dci_vton, **settings)
    assert images.shape == (1, 32, 16, 3)
    same = {**dressed, "output_type": "np"}
    pasted = run(dci_vton, **same)[0]
    kept = 1 - white(dressed["mask_image"]).numpy() > 0
    expected = np.array(dressed["image"]).astype(np.float32) / 255
    np.testing.assert_allclose(pasted[kept], expected[kept], atol=1e-6)
    plain = run(dci_vton, **same, paste_back=False)[0]
    np.testing.assert_array_equal(pasted[~kept], plain[~kept])
    assert np.abs(plain[kept] - expected[kept]).max() > 0.05


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (32, 48)),
        ({"height": 16, "width": 36}, (16, 36)),
        ({"output_size": (10, 30)}, (10, 30)),
        ({"height": 16, "width": 36, "output_size": (7, 5)}, (7, 5)),
    ],
    ids=str,
)
def test_sizes(dci_vton, dressed, picture, hole, run, sizes, expected) -> None:
    wide = {**dressed, "image": picture(1, 20, 30), "mask_image": hole(20, 30)}
    images = run(dci_vton, **wide, **sizes, output_type="np")
    assert images.shape == (1, *expected, 3)
    latents = run(dci_vton, **wide, **sizes)
    cells = (sizes.get("height", 32) // 2, sizes.get("width", 24) // 2)
    assert latents.shape[-2:] == cells


def test_result_is_resized_after_pasting(dci_vton, dressed, run) -> None:
    whole = run(dci_vton, **dressed, output_type="pt", output_size=(32, 24))
    small = run(dci_vton, **dressed, output_type="pt", output_size=(16, 12))
    torch.testing.assert_close(
        small, torch.nn.functional.interpolate(whole, (16, 12), mode="bilinear", antialias=True)
    )


def test_a_batch_of_three_equals_three_single_runs(
    dci_vton, dressed, batch_inputs, picture, run
) -> None:
    batch = {
        **batch_inputs,
        "warped_image": [picture(seed) for seed in (7, 8, 9)],
        "warped_mask_image": dressed["warped_mask_image"],
    }
    together = run(dci_vton, **batch, seeds=(1, 2, 3))
    for index in range(3):
        one = {
            name: values[index] if isinstance(values, list) else values
            for name, values in batch.items()
        }
        alone = run(dci_vton, **one, seeds=(index + 1,))
        torch.testing.assert_close(together[index], alone[0], rtol=1e-4, atol=1e-4)


def test_one_person_tries_on_several_warped_garments(dci_vton, dressed, picture, run) -> None:
    several = {**dressed, "warped_image": [picture(7), picture(8)]}
    together = run(dci_vton, **several, seeds=(1, 1))
    alone = run(dci_vton, **{**dressed, "warped_image": picture(8)}, seeds=(1,))
    torch.testing.assert_close(together[1], alone[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_the_garment_is_cut_out_of_its_picture(dci_vton, dressed, run, unet_calls) -> None:
    calls = unet_calls(dci_vton)
    reference = np.array(dressed["reference_image"])
    mask = np.zeros((20, 20), np.uint8)
    mask[6:14, 4:8] = 255
    settings = {**dressed, "num_inference_steps": 1}
    run(dci_vton, **settings, reference_mask_image=Image.fromarray(mask), crop_enlargement=0.5)
    # half extents of 4 rows and 2 columns, half of that more on each side
    cut = Image.fromarray(reference[4:16, 3:9])
    run(dci_vton, **{**settings, "reference_image": cut})
    run(dci_vton, **settings)
    contexts = [context for _, context in calls]
    assert torch.equal(contexts[0], contexts[1])
    assert not torch.allclose(contexts[0], contexts[2], atol=1e-4)


@pytest.mark.parametrize("kind", ["PIL", "array", "tensor", "batch"])
def test_every_kind_of_image_is_cut_alike(kind) -> None:
    pixels = np.arange(2 * 12 * 10 * 3, dtype=np.uint8).reshape(2, 12, 10, 3)
    mask = np.zeros((12, 10), np.uint8)
    mask[4:8, 0:4] = 255
    images = {
        "PIL": [Image.fromarray(image) for image in pixels],
        "array": [*pixels],
        "tensor": [torch.from_numpy(image).movedim(-1, 0) for image in pixels],
        "batch": pixels,
    }[kind]
    cut = crop_to_object(images, mask, 0.5, name="reference_image", mask_name="m")
    for index, piece in enumerate(cut):
        found = piece.movedim(0, -1).numpy() if kind != "PIL" else np.asarray(piece)
        # a margin of 1 pixel, which the left edge has no room for
        assert np.array_equal(found, pixels[index, 3:9, 0:5])


def test_the_published_margin() -> None:
    mask = np.zeros((100, 100), np.uint8)
    mask[20:60, 30:70] = 255
    (cut,) = crop_to_object(mask[..., None].repeat(3, 2), mask, 0.15, name="a", mask_name="b")
    assert cut.shape == (3, 46, 46)  # 40 and 0.15 * 20 on each side


def test_a_model_folder_comes_back(dci_vton, dressed, run, tmp_path) -> None:
    dci_vton.use_sampler("official")
    dci_vton.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    assert type(loaded) is DCIVTONPipeline
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(run(loaded, **dressed), run(dci_vton, **dressed))
    with pytest.raises(ValueError, match="holds a DCIVTONPipeline, not a PaintByExamplePipeline"):
        PaintByExamplePipeline.from_pretrained(tmp_path)


WRONG = {
    "no person": ({"image": None}, "image must be given, got None"),
    "no garment": ({"reference_image": None}, "reference_image must be given, got None"),
    "no warp": (
        {"warped_image": None},
        "warped_image must be given, got None: DCI-VTON needs the output of a warp network",
    ),
    "no warp mask": ({"warped_mask_image": None}, "warped_mask_image must be given, got None"),
    "warp mask size": (
        {"warped_mask_image": Image.new("L", (12, 16))},
        r"warped_mask_image must have the size of warped_image, 32 x 24 .* got 16 x 12",
    ),
    "warp count": (
        {"image": [GREY] * 3, "mask_image": WHITE, "warped_image": [GREY] * 2},
        "warped_image must hold 1 image or 3, as many as image, got 2",
    ),
    "warp mask count": (
        {"warped_image": [GREY] * 3, "warped_mask_image": [WHITE] * 2},
        "warped_mask_image must hold 1 image or 3, as many as warped_image, got 2",
    ),
    "reference mask size": (
        {"reference_mask_image": WHITE},
        "reference_mask_image must have the size of reference_image, 20 x 20 .* got 32 x 24",
    ),
    "reference mask black": (
        {"reference_mask_image": Image.new("L", (20, 20))},
        "reference_mask_image must be white somewhere, it is all black",
    ),
    "enlargement": (
        {"reference_mask_image": Image.new("L", (20, 20), 255), "crop_enlargement": -0.1},
        "crop_enlargement must be a finite number of at least 0, got -0.1",
    ),
    "output size": (
        {"output_size": (0, 5)},
        r"output_size must be a height and a width of at least 1, got \(0, 5\)",
    ),
    "paste latents": (
        {"paste_back": True, "output_type": "latent"},
        "paste_back needs an output_type other than 'latent'",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_bad_input(dci_vton, dressed, unet_calls, change, message) -> None:
    calls = unet_calls(dci_vton)
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        dci_vton(**{**dressed, "num_inference_steps": 1, **change})
    assert "\n" not in str(caught.value)
    assert not calls
