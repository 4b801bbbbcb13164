"""Min-max, pictures and presets."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from i2am.attribution import OFFICIAL, PAPER, get_preset, normalize, picture, resize, threshold
from i2am.attribution.postprocess import is_constant, mask_product


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_normalise_spans_zero_to_one_per_map():
    maps = rand(2, 3, 4, 5)
    result = normalize(maps)
    assert result.amin((-2, -1)).eq(0).all()
    assert result.amax((-2, -1)).eq(1).all()
    one = maps[1, 2]
    torch.testing.assert_close(result[1, 2], (one - one.min()) / (one.max() - one.min()))


def test_shared_normalisation_keeps_maps_comparable():
    maps = rand(2, 3, 4, 5) * torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    per_sample = normalize(maps, shared=(1,))
    assert torch.equal(per_sample, normalize(maps, shared=(-3,)))
    torch.testing.assert_close(per_sample[0], normalize(maps[0], shared=True))
    torch.testing.assert_close(
        normalize(maps, shared=True), normalize(maps.flatten()[None])[0].reshape(maps.shape)
    )
    assert per_sample[0, 0].max() < per_sample[0, 2].max() == 1


@given(scale=st.floats(1e-6, 1e6), shift=st.floats(-2, 2), seed=st.integers(0, 9))
@settings(max_examples=30)
def test_normalise_ignores_scale_and_offset(scale, shift, seed):
    maps = rand(2, 4, 3, seed=seed).double()
    torch.testing.assert_close(normalize(scale * (maps + shift)), normalize(maps))


@pytest.mark.parametrize("value", [0.0, 1 / 3, -2.0])
def test_a_constant_map_is_zero(value):
    # resized, so that fp32 rounding makes it a little less constant
    maps = torch.stack([resize(torch.full((3, 5), value), (7, 9)), rand(7, 9)])
    assert is_constant(maps).flatten().tolist() == [True, False]
    assert normalize(maps)[0].eq(0).all()
    assert normalize(maps, epsilon=1e-8)[0].eq(0).all()
    assert normalize(maps)[1].max() == 1


def test_epsilon_widens_the_range():
    maps = torch.tensor([[0.0, 3.0]])
    assert normalize(maps, epsilon=1.0).tolist() == [[0, 0.75]]


def test_dtypes_and_empty_batches():
    assert normalize(rand(3, 3).half()).dtype == torch.float32
    assert normalize(rand(3, 3).double()).dtype == torch.float64
    assert normalize(torch.zeros(0, 3, 3)).shape == (0, 3, 3)
    assert picture(torch.zeros(0, 2, 3, 3), (6, 6), shared=True).shape == (0, 2, 6, 6)


def test_threshold_drops_the_value_itself():
    maps = torch.tensor([[0.2, 0.4, 0.5]])
    assert torch.equal(threshold(maps), torch.tensor([[0, 0, 0.5]]))
    assert torch.equal(threshold(maps, 0.1), maps)


def test_the_paper_picture_is_eqs_8_and_9():
    maps = rand(2, 4, 3)
    plain = resize(normalize(maps), (32, 24), mode="bicubic")
    assert plain.max() > 1  # bicubic overshoots, which is what the clamp is for
    result = picture(maps, (32, 24))
    assert torch.equal(result, threshold(plain.clamp(0, 1)))
    assert torch.equal(picture(maps, (32, 24), threshold=None), plain.clamp(0, 1))
    assert torch.equal(picture(maps, (32, 24), preset=PAPER), result)


def test_the_official_picture_normalises_twice_and_can_be_inverted():
    maps = rand(2, 4, 3)
    twice = normalize(resize(normalize(maps), (32, 24), mode="bicubic"))
    assert torch.equal(picture(maps, (32, 24), preset="official", threshold=None), twice)
    inverted = picture(maps, (32, 24), preset="official", invert=True)
    assert torch.equal(inverted, threshold(1 - twice))


def test_mask_product_resizes_the_mask_bicubic():
    maps, mask = rand(2, 4, 3), (rand(2, 16, 12) > 0.5).float()
    assert torch.equal(mask_product(maps, mask), maps * resize(mask, (4, 3), mode="bicubic"))


def test_presets_by_name():
    assert get_preset("paper") is PAPER
    assert get_preset("official") is OFFICIAL
    own = dataclasses.replace(PAPER, without=("mid",))
    assert get_preset(own) is own


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: normalize(torch.ones(3)), r"maps must be .* got \[3\]"),
        (lambda: normalize(torch.ones(2, 0, 3)), "not empty"),
        (lambda: normalize(torch.tensor([[[1.0, torch.nan]], [[1, 2]]])), "NaN or Inf in 1 of 2"),
        (lambda: normalize(torch.tensor([[1.0, torch.inf]])), "NaN or Inf in 1 of 1 maps"),
        (lambda: normalize(torch.ones(2, 3, 3), shared=(1,)), "shared must name leading axes"),
        (lambda: normalize(torch.ones(2, 3, 3), shared=(-1,)), "shared must name leading axes"),
        (lambda: picture(torch.ones(3, 3), (0, 4)), "size must be at least 1x1"),
        (lambda: picture(torch.full((3, 3), torch.nan), (4, 4)), "maps must be finite"),
        (lambda: picture(torch.ones(3, 3), (4, 4), preset="v2"), "preset must be 'paper'"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
