"""L1 and SSIM inside a mask: by hand, and against scikit-image."""

import re

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from i2am.metrics import masked_l1, masked_ssim

METRICS = pytest.mark.parametrize("metric", [masked_l1, masked_ssim], ids=lambda m: m.__name__)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def border(mask, width):
    """The mask without a frame of `width` pixels."""
    inner = torch.zeros_like(mask)
    inner[:, width:-width, width:-width] = mask[:, width:-width, width:-width]
    return inner


def test_l1_is_the_weighted_mean_of_the_differences():
    images, target = torch.zeros(2, 3, 1, 4), torch.zeros(2, 3, 1, 4)
    images[0, 0, 0] = torch.tensor([0.0, 0.3, 0.6, 0.9])
    mask = torch.tensor([[[0, 1, 1, 0]], [[1, 1, 1, 1]]])
    torch.testing.assert_close(masked_l1(images, target, mask), torch.tensor([0.15, 0.0]).double())
    torch.testing.assert_close(
        masked_l1(target, images, mask.bool()), torch.tensor([0.15, 0.0]).double()
    )
    soft = torch.tensor([[0, 1, 0, 0.5]]).expand(2, 1, 4)
    torch.testing.assert_close(
        masked_l1(images, target, soft), torch.tensor([(0.1 + 0.5 * 0.3) / 1.5, 0.0]).double()
    )


@pytest.mark.parametrize("window", [3, 7, 11])
def test_ssim_is_that_of_scikit_image(window):
    target = rand(3, 3, 40, 30)
    images = (target + 0.3 * (rand(3, 3, 40, 30, seed=1) - 0.5)).clamp(0, 1)
    images[1] = 0.5  # no structure at all
    mask = border((rand(3, 40, 30, seed=2) > 0.4).float(), window // 2)
    wanted = []
    for image, true, inside in zip(images, target, mask, strict=True):
        _, similarity = structural_similarity(
            true.double().numpy(),
            image.double().numpy(),
            win_size=window,
            data_range=1.0,
            channel_axis=0,
            use_sample_covariance=False,
            full=True,
        )
        wanted.append(similarity.mean(0)[inside.numpy() > 0].mean())
    scores = masked_ssim(images, target, mask, window)
    np.testing.assert_allclose(scores.numpy(), wanted, rtol=0, atol=1e-5)
    assert scores[1] < 0.2 < 0.5 < scores[0]


def test_the_mask_decides_what_counts():
    target = rand(1, 3, 32, 32)
    images = target.clone()
    images[..., 16:] = rand(1, 3, 32, 16, seed=1)
    left, right = torch.zeros(2, 1, 32, 32)
    left[..., :13], right[..., 19:] = 1, 1  # a window of 7 looks 3 pixels beyond the mask
    assert masked_l1(images, target, left) == 0
    torch.testing.assert_close(masked_ssim(images, target, left), torch.ones(1).double())
    assert masked_l1(images, target, right) > 0.2
    assert masked_ssim(images, target, right) < 0.2


@METRICS
def test_a_sample_does_not_depend_on_its_batch(metric):
    images, target = rand(4, 3, 24, 20), rand(4, 3, 24, 20, seed=1)
    mask = (rand(4, 24, 20, seed=2) > 0.5).float()
    alone = [metric(images[i : i + 1], target[i : i + 1], mask[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(metric(images, target, mask), torch.cat(alone))


@METRICS
def test_the_dtype_of_the_pictures_does_not_matter(metric):
    images, target = rand(2, 3, 16, 16).half(), rand(2, 3, 16, 16, seed=1).half()
    scores = metric(images, target, torch.ones(2, 16, 16))
    assert scores.dtype == torch.float64
    assert torch.equal(scores, metric(images.float(), target.float(), torch.ones(2, 16, 16)))


WRONG = {
    "images must be [batch, 3, height, width], got [2, 1, 8, 8]": {"images": rand(2, 1, 8, 8)},
    "target must have the shape of images, [2, 3, 8, 8], got [1, 3, 8, 8]": {
        "target": rand(1, 3, 8, 8)
    },
    "mask must be [2, 8, 8], got [8, 8]": {"mask": torch.ones(8, 8)},
    "images must hold values in [0, 1]": {"images": 1 + rand(2, 3, 8, 8)},
    "target must hold values in [0, 1]": {"target": torch.full((2, 3, 8, 8), torch.nan)},
    "mask must hold values in [0, 1]": {"mask": torch.full((2, 8, 8), 255.0)},
    "mask must cover something, but that of sample 1 is empty": {
        "mask": torch.stack([torch.ones(8, 8), torch.zeros(8, 8)])
    },
}


@METRICS
@pytest.mark.parametrize(("message", "wrong"), WRONG.items(), ids=WRONG)
def test_wrong_input_is_refused(metric, message, wrong):
    right = {
        "images": rand(2, 3, 8, 8),
        "target": rand(2, 3, 8, 8),
        "mask": torch.ones(2, 8, 8),
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        metric(**{**right, **wrong})


@pytest.mark.parametrize("window", [1, 6, 9])
def test_a_window_has_a_centre_and_fits(window):
    with pytest.raises(ValueError, match=f"window must be odd, at least 3 and at most 8.*{window}"):
        masked_ssim(rand(1, 3, 8, 9), rand(1, 3, 8, 9), torch.ones(1, 8, 9), window)


def test_without_torchmetrics_one_sentence_says_what_to_install(fork):
    code = """if True:
        import sys
        sys.modules["torchmetrics"] = None
        import torch
        from i2am.metrics import masked_l1, masked_ssim
        images, mask = torch.zeros(1, 3, 8, 8), torch.ones(1, 8, 8)
        assert masked_l1(images, images, mask) == 0
        try:
            masked_ssim(images, images, mask)
        except ImportError as error:
            assert 'pip install "i2am[metrics]"' in str(error), error
        else:
            sys.exit("no error")
    """
    done = fork(code)
    _, err = done.communicate()
    assert done.returncode == 0, err
