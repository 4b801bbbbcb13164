"""Masks turned the wrong way: noticed in every picture, never where they are right."""

import shutil

import pytest
import torch
from PIL import Image, ImageChops

from i2am.data import VitonHD, render, write_viton_hd
from i2am.data.vitonhd_masks import looks_inverted

COUNT = 6


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "viton"
    write_viton_hd(folder, train=COUNT, test=0)
    return folder


@pytest.fixture
def root(written, tmp_path):
    return shutil.copytree(written, tmp_path / "viton")


def invert(path):
    with Image.open(path) as image:
        ImageChops.invert(image).save(path)


def test_the_guess_is_right():
    scenes = render(range(48), split="train")
    painted = {"mask": scenes.agnostic, "garment_mask": None, "garment_region": None}
    for name, agnostic in painted.items():
        for index, mask in enumerate(getattr(scenes, name)):
            for picture in (None, None if agnostic is None else agnostic[index]):
                assert not looks_inverted(mask, picture)
                assert looks_inverted(1 - mask, picture)


def test_the_painted_grey_decides_over_the_frame():
    # all but a rim inside is to be generated: the frame alone is wrong
    mask = torch.ones(20, 20)
    mask[5:15, 5:15] = 0
    agnostic = torch.where(mask > 0, 0.5, 0.9).expand(3, -1, -1)
    assert looks_inverted(mask)
    assert not looks_inverted(mask, agnostic)
    assert looks_inverted(1 - mask, agnostic)
    assert not looks_inverted(1 - mask, torch.full((3, 20, 20), 0.9))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_one_colour_is_no_inversion(value):
    mask = torch.full((8, 6), value)
    assert not looks_inverted(mask)
    assert not looks_inverted(mask, torch.full((3, 8, 6), 0.5))


def test_good_masks_need_no_warning(written):
    assert VitonHD(written, size=(64, 48), warps=True).mask_warnings() == ()


@pytest.mark.parametrize(
    ("folder", "ending", "what"),
    [
        ("agnostic-mask", "_mask.png", "is to be generated"),
        ("cloth-mask", ".jpg", "shows the garment"),
        ("gt_cloth_warped_mask", ".jpg", "shows the garment"),
    ],
)
def test_inverted_masks_are_told(root, folder, ending, what):
    data = VitonHD(root, size=(64, 48))
    for index in range(3):
        invert(root / f"train/{folder}/0000{index}_00{ending}")
    assert data.mask_warnings() == ()
    invert(root / f"train/{folder}/00003_00{ending}")
    assert data.mask_warnings() == (
        f"4 of 6 masks of {folder} look inverted, the first that of line 1: "
        f"white must be what {what}",
    )


def test_masks_of_one_colour_are_told(root):
    data = VitonHD(root, size=(64, 48))
    for index in (1, 4):
        Image.new("L", (96, 128), 1).save(data.path("mask", index))
    expected = (
        "2 of 6 masks of agnostic-mask are all black or all white once cut at 128 of 255, "
        "the first that of line 2: their scores are undefined",
    )
    assert data.mask_warnings() == expected
    # the first and the fourth pair are looked at
    assert data.mask_warnings(2) == ()


def test_pictures_in_place_of_masks_are_told(root):
    folder = root / "train" / "cloth-mask"
    for name in ("00001_00.jpg", "00003_00.jpg"):
        shutil.copy(root / "train" / "image" / name, folder / name)
    told = [w for w in VitonHD(root, size=(64, 48)).mask_warnings() if "rather than masks" in w]
    assert told == [
        f"2 of {COUNT} masks of cloth-mask look like pictures rather than masks, the first that of "
        "line 2: their pixels of half brightness and more count as white"
    ]


def test_what_cannot_be_read_is_left_out(root):
    data = VitonHD(root, size=(64, 48))
    data.path("mask", 0).write_bytes(b"")
    data.path("agnostic", 1).unlink()
    for index in range(2, 5):
        invert(data.path("mask", index))
    (warning,) = data.mask_warnings()
    assert warning.startswith("3 of 4 masks of agnostic-mask look inverted, the first that of line")


def test_some_must_be_looked_at(written):
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        VitonHD(written).mask_warnings(0)
