"""Images and masks of every kind become the same tensors."""

import warnings

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from i2am.models.inputs import (
    common_batch,
    fit,
    per_sample,
    read_images,
    read_masks,
    read_person,
    same_size,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
TENSOR = torch.from_numpy(PIXELS).movedim(-1, 1).float() / 255
SIGNED = TENSOR * 2 - 1
MASK = np.random.default_rng(1).integers(0, 2, (2, 5, 4)).astype(np.float32)


@pytest.mark.parametrize(
    "images",
    [
        [Image.fromarray(one) for one in PIXELS],
        [Image.fromarray(one).convert("RGBA") for one in PIXELS],
        PIXELS,
        list(PIXELS),
        PIXELS.astype(np.float64) / 255,
        PIXELS[..., ::-1].copy()[..., ::-1],
        TENSOR,
        tuple(TENSOR),
        [PIXELS[0], TENSOR[1]],
        TENSOR.double(),
        torch.from_numpy(PIXELS).movedim(-1, 1),
    ],
    ids="pil rgba uint8 list float64 flipped tensor tuple mixed double bytes".split(),
)
def test_images(images) -> None:
    read = read_images(images, "image")
    assert len(read) == 2
    for found, expected in zip(read, SIGNED, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_images_without_negative_values_are_read_as_diffusers_does() -> None:
    expected = VaeImageProcessor(do_resize=False).preprocess(TENSOR)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(torch.stack(read_images(TENSOR, "image")), expected)


@pytest.mark.parametrize(
    "images",
    [SIGNED, list(SIGNED), SIGNED.movedim(1, -1).double().numpy(), [PIXELS[0], SIGNED[1]]],
    ids=["tensor", "list", "array", "beside bytes"],
)
def test_negative_values_mean_the_symmetric_range_once_said(images) -> None:
    with pytest.warns(FutureWarning, match=r"^image holds negative .* \[-1, 1\]; give") as said:
        read = read_images(images, "image")
    assert len(said) == 1
    torch.testing.assert_close(torch.stack(read), SIGNED, rtol=0, atol=1e-6)


def test_one_dark_pixel_tells_the_range_of_every_entry() -> None:
    bright, dark = torch.full((3, 2, 2), 0.5), torch.full((3, 2, 2), -1.0)
    with pytest.warns(FutureWarning, match="image holds negative values"):
        read = read_images([bright, dark], "image")
    assert torch.equal(torch.stack(read), torch.stack([bright, dark]))


@pytest.mark.parametrize(
    "image",
    [Image.new("RGB", (4, 5)), np.zeros((5, 4, 3)), torch.zeros(2, 3, 5, 4)],
    ids=["pil", "array", "tensor"],
)
def test_the_size_of_an_image_is_height_and_width(image) -> None:
    assert same_size([image, torch.zeros(3, 5, 4)], "image") == (5, 4)


@pytest.mark.parametrize(
    "masks",
    [
        [Image.fromarray((one * 255).astype(np.uint8)) for one in MASK],
        [Image.fromarray((one * 255).astype(np.uint8)).convert("1") for one in MASK],
        [Image.fromarray((one * 255).astype(np.uint8)).convert("RGB") for one in MASK],
        MASK,
        MASK.astype(bool),
        (MASK * 255).astype(np.uint8)[..., None],
        torch.from_numpy(MASK),
        torch.from_numpy(MASK)[:, None],
        torch.from_numpy(MASK).bool(),
        list(torch.from_numpy(MASK)),
    ],
    ids="pil bilevel rgb float bool channel tensor bchw bool_tensor list".split(),
)
def test_masks(masks) -> None:
    read = read_masks(masks, "mask_image")
    assert [tuple(one.shape) for one in read] == [(1, 5, 4)] * 2
    torch.testing.assert_close(torch.cat(read), torch.from_numpy(MASK))


def test_the_callers_array_is_not_touched() -> None:
    before = PIXELS.copy()
    read_images(PIXELS, "image")[0].zero_()
    np.testing.assert_array_equal(PIXELS, before)


def test_keep_mask_is_binary_and_white_is_the_hole() -> None:
    levels = torch.tensor([[0.0, 127 / 255, 0.5, 128 / 255, 1.0]])
    person, keep = read_person(torch.zeros(3, 1, 5), levels, (1, 5))
    assert keep.flatten().tolist() == [1, 1, 1, 0, 0]
    assert person.shape == (1, 3, 1, 5)


def test_fit_resizes_with_antialiasing_and_leaves_the_right_size_alone() -> None:
    stripes = torch.tensor([0.0, 1.0]).repeat(8).expand(1, 16, 16)
    assert fit([stripes], (4, 4)).sub(0.5).abs().max() < 0.15
    assert torch.equal(fit([stripes], (16, 16))[0], stripes)
    assert fit([stripes, torch.zeros(1, 3, 5)], (8, 6)).shape == (2, 1, 8, 6)


def test_samples_of_one_input_stand_side_by_side() -> None:
    assert per_sample(torch.tensor([[1], [2]]), 2, 3).flatten().tolist() == [1, 1, 1, 2, 2, 2]
    assert per_sample(torch.tensor([[7]]), 2, 2).flatten().tolist() == [7] * 4
    assert common_batch(image=1, mask_image=3, reference_image=1) == 3


def test_values_below_minus_one_are_refused() -> None:
    message = r"image must have values in \[-1, 1\], got -1.\d+ to"
    with (
        pytest.warns(FutureWarning, match="negative"),
        pytest.raises(ValueError, match=message),
    ):
        read_images(SIGNED - 1, "image")


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (None, MASK, "image must be given together with mask_image, got None"),
        (TENSOR, None, "mask_image must be given together with image, got None"),
        (TENSOR, MASK[:, :4], "mask_image must have the size of image, 5 x 4 .*, got 4 x 4"),
        (np.zeros((0, 4, 3), np.uint8), MASK, r"image must have shape .* got \[0, 4, 3\]"),
        (PIXELS.astype(np.float32), MASK, r"image must have values in \[0, 1\]"),
        (TENSOR * 2, MASK, r"image must have values in \[0, 1\]"),
        (PIXELS.astype(np.int64), MASK, r"image must have values in \[0, 1\]"),
        (PIXELS, MASK[0, 0], r"mask_image must have shape \[height, width\].* got \[4\]"),
        (PIXELS, MASK * np.nan, "mask_image must hold values in"),
    ],
)
def test_bad_input(image, mask, message) -> None:
    with pytest.raises(ValueError, match=message):
        read_person(image, mask, (5, 4))
