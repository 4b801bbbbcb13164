"""Files that spoil one pair: refused alone, with a code and a line, while the others are read."""

import pickle
import shutil
from functools import cache
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from i2am.data import VitonHD, write_viton_hd
from i2am.data.images import ImageRejected

SIZE = (32, 24)
MASKS = ("mask", "garment_mask", "warped_mask")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "viton"
    write_viton_hd(folder, train=0, test=3)
    return folder


@pytest.fixture
def root(written, tmp_path):
    return shutil.copytree(written, tmp_path / "viton")


def truncated(path):
    path.write_bytes(path.read_bytes()[:-200])


def cut_in_its_header(path):
    path.write_bytes(path.read_bytes()[:2])


def text(path):
    path.write_text("no picture")


def nothing(path):
    path.write_bytes(b"")


def a_folder(path):
    path.unlink()
    path.mkdir()


def gone(path):
    path.unlink()


def noise(path):
    path.write_bytes(np.random.default_rng(0).bytes(4000))


@cache
def zeros(width, height):
    file = BytesIO()
    Image.new("1", (width, height)).save(file, format="PNG")
    return file.getvalue()


def bomb(width, height):
    return lambda path: path.write_bytes(zeros(width, height))


def deep(path):
    Image.fromarray(np.full((128, 96), 1000, np.uint16)).save(path, format="PNG")


def wide(path):
    Image.new("RGB", (128, 128), "white").save(path, format="PNG")


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        pytest.param(truncated, "truncated", id="truncated"),
        pytest.param(cut_in_its_header, "unidentified_image", id="header"),
        pytest.param(text, "unidentified_image", id="text"),
        pytest.param(nothing, "unidentified_image", id="0-bytes"),
        pytest.param(noise, "unidentified_image", id="noise"),
        pytest.param(a_folder, "unidentified_image", id="folder"),
        pytest.param(gone, "missing", id="gone"),
        pytest.param(bomb(10_000, 10_000), "too_large", id="bomb-that-pillow-warns-of"),
        pytest.param(bomb(14_000, 13_000), "too_large", id="bomb-that-pillow-refuses"),
        pytest.param(deep, "deep", id="16-bit"),
        pytest.param(wide, "aspect", id="aspect"),
    ],
)
@pytest.mark.parametrize("name", ["image", "garment", "mask"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bad_file_spoils_its_pair_alone(root, written, spoil, code, name):
    path = VitonHD(root, "test", SIZE).path(name, 1)
    plain = VitonHD(written, "test", SIZE)
    data = VitonHD(root, "test", SIZE)
    spoil(path)
    with pytest.raises(ImageRejected) as caught:
        data[1]
    assert caught.value.code == code
    message = str(caught.value)
    assert message.startswith(f"{name} {path} ")
    assert message.endswith(" (line 2 of test_pairs.txt)")
    assert "\n" not in message
    for index in (0, 2):
        item, expected = data[index], plain[index]
        assert all(torch.equal(item[key], expected[key]) for key in expected)


def test_nobody_lets_pillow_load_half_a_picture():
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_the_code_comes_back_from_another_process(root):
    truncated(root / "test/image/00001_00.jpg")
    with pytest.raises(ImageRejected) as caught:
        VitonHD(root, "test", SIZE)[1]
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.code) == (str(caught.value), "truncated")


# Kinds of pictures


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA", "1"])
def test_every_mode_is_the_same_picture(root, mode):
    grey = np.zeros((128, 96), np.uint8)
    grey[40:90, 20:70] = 255
    image = Image.fromarray(grey).convert("RGB")
    ending = "jpg" if mode == "CMYK" else "png"
    image.convert(mode).save(root / f"test/image/00001_00.{ending}", quality=100)
    if ending == "png":
        (root / "test/image/00001_00.jpg").unlink()
    item = VitonHD(root, "test", (128, 96)).read("image", 1)
    expected = torch.from_numpy(grey).float().expand(3, -1, -1) / 255
    assert (item - expected).abs().max() < 0.05


def test_a_rotated_picture_is_turned_before_it_is_measured(root, written):
    path = root / "test/image/00001_00.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    with Image.open(path) as image:
        turned = image.transpose(Image.Transpose.ROTATE_90)
        turned.save(path, exif=exif, quality=100, subsampling=0)
    item = VitonHD(root, "test", SIZE).read("image", 1)
    assert (item - VitonHD(written, "test", SIZE).read("image", 1)).abs().mean() < 0.01


# Shapes


def test_a_percent_of_shape_is_no_matter(root):
    path = root / "test/image/00001_00.jpg"
    Image.new("RGB", (970, 1280), "white").save(path)  # 1.04 % wider than 3:4
    data = VitonHD(root, "test", SIZE)
    with pytest.raises(ImageRejected, match=r"shape of 24 x 32 pixels to within 1%, it has 970 x"):
        data[1]
    Image.new("RGB", (969, 1280), "white").save(path)
    assert data[1]["image"].shape == (3, *SIZE)


def test_another_shape_can_be_allowed(written):
    data = VitonHD(written, "test", (32, 32))
    for name in data.names:
        with pytest.raises(ImageRejected) as caught:
            data.read(name, 0)
        assert caught.value.code == "aspect"
    item = VitonHD(written, "test", (32, 32), stretch=True)[0]
    for name, field in item.items():
        assert field.shape == ((32, 32) if name in MASKS else (3, 32, 32))


# Masks


@pytest.mark.parametrize("level", [0, 1, 127, 128, 255])
@pytest.mark.parametrize("name", ["mask", "garment_mask"])
def test_a_mask_of_one_colour_is_read(root, name, level):
    data = VitonHD(root, "test", SIZE)
    Image.new("L", (96, 128), level).save(data.path(name, 1))
    # where 1 is the largest value, it is white
    assert data[1][name].unique().tolist() == [float(level == 1 or level >= 128)]


def test_a_soft_mask_is_cut_at_half(root):
    data = VitonHD(root, "test", (128, 96))
    ramp = np.tile(np.linspace(80, 175, 96).round().astype(np.uint8), (128, 1))  # 80, 81, ...
    Image.fromarray(ramp).save(data.path("mask", 1))
    assert torch.equal(data[1]["mask"], torch.from_numpy(ramp >= 128).float())


def test_transparent_parts_of_a_mask_are_black(root):
    data = VitonHD(root, "test", (128, 96))
    pixels = np.full((128, 96, 4), 255, np.uint8)
    pixels[:64, :, 3] = 0
    Image.fromarray(pixels).save(data.path("mask", 1))
    assert data[1]["mask"].mean(dim=1).tolist() == [0.0] * 64 + [1.0] * 64
