"""Pictures and masks of every kind that Python has, against what their files mean."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from i2am.data.arrays import as_pil, mask_batch, masks, object_mask, pictures, sizes
from i2am.data.images import as_rgb, read_image, read_mask
from i2am.data.shapes import cut_mask, cut_picture, require_grid, require_shape, require_size

RANDOM = np.random.default_rng(0)
RGBA = RANDOM.integers(0, 256, (9, 7, 4), dtype=np.uint8)
GREY = RGBA[..., 0]
SHAPE = np.zeros((9, 7), np.uint8)
SHAPE[2:6, 1:4] = 255


def indexed(image):
    """With a palette whose entry 0 is transparent."""
    image = image.convert("P")
    image.info["transparency"] = 0
    return image


MODES = {
    "1": lambda: Image.fromarray(SHAPE).convert("1"),
    "L": lambda: Image.fromarray(GREY),
    "LA": lambda: Image.fromarray(RGBA).convert("LA"),
    "P": lambda: Image.fromarray(RGBA[..., :3]).convert("P"),
    "P, transparent": lambda: indexed(Image.fromarray(RGBA[..., :3])),
    "RGB": lambda: Image.fromarray(RGBA[..., :3]),
    "RGBA": lambda: Image.fromarray(RGBA),
    "CMYK": lambda: Image.fromarray(RGBA[..., :3]).convert("CMYK"),
}
TURNS = range(1, 9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:mask looks like a picture")
def test_every_mode_of_pil_means_what_its_file_means(mode, tmp_path):
    image = MODES[mode]()
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path)
    (picture,), (mask,) = pictures(image, "image"), masks(image, "mask")
    assert np.array_equal(picture.movedim(0, -1).numpy(), np.asarray(read_image(path)))
    assert np.array_equal(mask.numpy() * 255, np.asarray(read_mask(path, allow_uniform=True)))
    assert sizes(image, "image") == [(9, 7)]


@pytest.mark.parametrize("turn", TURNS)
def test_every_orientation_is_turned_upright(turn, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = turn
    file = io.BytesIO()
    Image.fromarray(SHAPE).save(file, "PNG", exif=exif.tobytes())
    photo = Image.open(file)
    path = tmp_path / "photo.png"
    path.write_bytes(file.getvalue())
    (mask,) = masks(photo, "mask")
    assert np.array_equal(mask.numpy() * 255, np.asarray(read_mask(path)))
    assert sizes(photo, "image") == [mask.shape]
    assert (mask.shape == (9, 7)) == (turn < 5)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
@pytest.mark.parametrize("read", [pictures, masks, as_pil])
def test_more_than_eight_bits_are_refused(mode, read):
    values = np.full((4, 3), 300, {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
    with pytest.raises(ValueError, match="thing must have at most 8 bits per channel, it has"):
        read(Image.fromarray(values), "thing")


def test_a_file_of_sixteen_bits_that_was_not_decoded_yet(tmp_path):
    import struct
    import zlib

    def chunk(name, data):
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    path = tmp_path / "deep.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 7))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(ValueError, match="at most 8 bits per channel, it has 16"):
        pictures(Image.open(path), "image")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (RGBA[..., :3], RGBA[..., :3]),
        (GREY, GREY),
        (GREY[..., None], GREY),
        (RGBA, np.asarray(as_rgb(Image.fromarray(RGBA)))),
        (torch.from_numpy(RGBA), np.asarray(as_rgb(Image.fromarray(RGBA)))),
        (torch.from_numpy(RGBA).movedim(-1, 0), np.asarray(as_rgb(Image.fromarray(RGBA)))),
        (torch.from_numpy(GREY)[None], GREY),
        (RGBA[None, ..., :3], RGBA[..., :3]),
        (torch.from_numpy(RGBA[None, ..., :3]).movedim(-1, 1), RGBA[..., :3]),
        (RGBA[..., :3].astype(">f4") / 255, RGBA[..., :3]),
        (torch.from_numpy(RGBA[..., :3] / 255).movedim(-1, 0), RGBA[..., :3]),
    ],
    ids="rgb grey channel rgba tensor first one batch tensors big-endian float".split(),
)
def test_arrays_and_tensors_of_pictures(value, shown):
    (image,) = as_pil(value, "image")
    shown = shown if shown.ndim == 3 else shown[..., None].repeat(3, -1)
    assert np.array_equal(np.asarray(image), shown)
    assert sizes(value, "image") == [(9, 7)]


def test_floating_transparency_lies_over_white():
    (found,) = pictures(RGBA / 255, "image")
    colours, alpha = RGBA[..., :3] / 255, RGBA[..., 3:] / 255
    wanted = torch.from_numpy(colours * alpha + 1 - alpha).float().movedim(-1, 0)
    torch.testing.assert_close(found, wanted)


COLOURS = SHAPE[..., None].repeat(3, -1)
CUT_OUT = np.dstack([np.full_like(COLOURS, 255), SHAPE])
MASKS = {
    "uint8": SHAPE,
    "0 and 1": SHAPE // 255,
    "0 and 1, tensor": torch.from_numpy(SHAPE // 255),
    "0 and 1, PIL": Image.fromarray(SHAPE // 255),
    "0 and 1, colours": COLOURS // 255,
    "bool": SHAPE > 0,
    "float64": SHAPE / 255,
    "float16": torch.from_numpy(SHAPE / 255).half(),
    "int64": torch.from_numpy(SHAPE // 255).long(),
    "channel": SHAPE[..., None],
    "channel first": SHAPE[None, None] / 255,
    "colours": COLOURS,
    "colours, float": COLOURS / 255,
    "colours, tensor": torch.from_numpy(COLOURS).movedim(-1, 0)[None],
    "colours last, tensor": torch.from_numpy(COLOURS),
    "cut out": CUT_OUT,
    "cut out, float": CUT_OUT / 255,
    "cut out, PIL": Image.fromarray(CUT_OUT),
    "batch": SHAPE[None] > 0,
    "list": [SHAPE],
    "flipped": SHAPE[::-1].copy()[::-1],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.filterwarnings("error")
def test_every_kind_of_a_mask(mask):
    (found,) = masks(mask, "mask")
    assert found.dtype in (torch.float32, torch.float64)
    assert torch.equal(found.float(), torch.from_numpy(SHAPE > 0).float())


def test_grey_levels_of_an_array_are_kept():
    pixels = np.zeros((4, 10), np.uint8)
    pixels[0, :3] = 51, 128, 255
    (found,) = masks(pixels, "mask")
    assert found[0, :3].tolist() == pytest.approx([0.2, 128 / 255, 1])
    soft = torch.tensor([[0.25, 1.0]], dtype=torch.float64)
    assert torch.equal(masks(soft, "mask")[0], soft)


@pytest.mark.parametrize(
    "photo",
    [Image.fromarray(RGBA[..., :3]), RGBA[..., :3], RGBA[..., 0], RGBA[..., :3] / 255],
    ids=["PIL", "array", "grey", "float"],
)
def test_a_photo_given_for_a_mask_is_warned_of(photo):
    with pytest.warns(UserWarning, match="mask_image looks like a picture rather than a mask"):
        masks(photo, "mask_image")


def test_a_batch_of_masks_of_few_columns_is_no_picture():
    assert [tuple(one.shape) for one in masks(np.zeros((2, 5, 4)), "mask")] == [(5, 4)] * 2
    assert mask_batch([np.zeros((5, 4)), np.zeros((2, 5, 4))], "mask").shape == (3, 5, 4)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (
            SHAPE.astype(np.uint16),
            ValueError,
            r"m must be uint8, or floating .* got uint16",
        ),
        (torch.zeros(2, 2, dtype=torch.uint16), ValueError, "got uint16"),
        (SHAPE.astype(np.float32), ValueError, r"values in \[0, 1\] \(uint8.*got 0 to 255"),
        (SHAPE / -255.0, ValueError, "got -1 to -?0"),
        (SHAPE * np.nan, ValueError, "got nan to nan"),
        (SHAPE.astype(np.int64), ValueError, "got 0 to 255"),
        (SHAPE.astype(complex), ValueError, "real numbers, got complex"),
        (torch.zeros(2, 2, dtype=torch.complex64), ValueError, "real numbers"),
        (np.array([["a"]]), ValueError, "m must hold real numbers"),
        (SHAPE // 255 * 3, ValueError, "largest value is 3; of labels, choose one: labels == 3"),
        (Image.fromarray(SHAPE // 255 * 90), ValueError, "none of its pixels has half brightness"),
        (np.zeros(4), ValueError, r"m must have shape \[height, width\].*got \[4\]"),
        (np.zeros((1, 2, 5, 4, 1)), ValueError, "m must have shape"),
        (np.zeros((0, 4)), ValueError, "m must have shape"),
        (np.zeros((2, 5, 4, 2)), ValueError, "m must have shape"),
        ([], ValueError, "m must hold at least one image, got an empty list"),
        ("mask.png", TypeError, "m must be a PIL image, .* got str"),
        ([None], TypeError, "got NoneType"),
    ],
)
def test_what_is_no_mask(mask, error, message):
    with pytest.raises(error, match=message):
        masks(mask, "m")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((5, 4, 2)), "i must have shape .*height, width, 3"),
        (np.zeros((2, 2, 5, 6)), "i must have shape"),
        (RGBA * 1.0, r"i must have values in \[0, 1\]"),
        (np.zeros((5, 4, 3), np.uint16), "i must be uint8"),
    ],
)
def test_what_is_no_picture(image, message):
    with pytest.raises(ValueError, match=message):
        pictures(image, "i")


def test_masks_of_a_batch_have_one_size():
    with pytest.raises(ValueError, match="masks of one size, got 2 that differ"):
        mask_batch([torch.ones(2, 2), torch.ones(3, 2)], "mask")


class TestShape:
    def test_accepted(self):
        require_size("mask", (4, 3), "image", (4, 3))
        require_shape("mask", (1000, 755), "image", (4, 3))
        # 100 x 75 pixels halved, rounded up, three times
        require_grid("mask", (100, 75), "maps", (13, 10))

    @pytest.mark.parametrize(
        ("check", "size", "wanted", "message"),
        [
            (require_size, (8, 6), (4, 3), "m must have the size of i, 4 x 3 .* got 8 x 6$"),
            (require_size, (3, 4), (4, 3), "got 3 x 4: height and width look swapped"),
            (require_shape, (1000, 758), (4, 3), "m must have the shape of i to within 1%"),
            (require_shape, (6, 8), (4, 3), "height and width look swapped"),
            (require_grid, (24, 32), (16, 12), "m must have the shape of i, 16 x 12 .*swapped"),
            (require_grid, (512, 384), (64, 64), "got 512 x 384$"),
        ],
    )
    def test_refused(self, check, size, wanted, message):
        with pytest.raises(ValueError, match=message):
            check("m", size, "i", wanted)


class TestCut:
    def test_whole_pixels(self):
        mask = torch.rand(2, 8, 6, generator=torch.Generator().manual_seed(0))
        assert torch.equal(cut_mask(mask, (0.25, 0.5, 0.5, 0.5)), mask[:, 2:6, 3:6])
        picture = Image.fromarray(RGBA[:8, :6, :3])
        cut = cut_picture(picture, (0.25, 0.5, 0.5, 0.5))
        assert np.array_equal(np.asarray(cut), RGBA[2:6, 3:6, :3])

    def test_parts_of_pixels_are_means(self):
        mask = torch.tensor([[[0.0, 1.0, 0.5, 0.25]]])
        # columns 0.5 to 2.5
        found = cut_mask(mask, (0, 0.125, 1, 0.5))
        assert found.tolist() == [[[0.5, 0.75]]]

    def test_nothing_lies_beyond(self):
        found = cut_mask(torch.ones(1, 4, 4), (-0.5, 0, 2, 1))
        assert found.shape == (1, 8, 4)
        assert found[0, :, 0].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


class TestObject:
    def test_of_an_alpha_channel(self):
        with pytest.warns(UserWarning, match="object in picture was made from the alpha channel"):
            assert np.array_equal(object_mask(CUT_OUT), SHAPE > 0)

    @pytest.mark.parametrize("dtype", [np.uint8, np.float32])
    def test_of_a_plain_background_with_a_hole_of_its_colour(self, dtype):
        pixels = np.full((30, 20, 3), 240, np.uint8)
        pixels += RANDOM.integers(0, 8, pixels.shape, dtype=np.uint8)
        ring = np.zeros((30, 20), bool)
        ring[5:25, 4:16] = True
        pixels[ring] = 90
        pixels[10:15, 8:12] = 240  # a white badge
        pixels = pixels if dtype == np.uint8 else pixels.astype(dtype) / 255
        with pytest.warns(UserWarning, match="made from the plain background: 40% of the picture"):
            assert np.array_equal(object_mask(pixels), ring)

    def test_a_bay_is_background(self):
        pixels = np.full((30, 30), 250, np.uint8)
        pixels[5:25, 5:25] = 40
        pixels[12:18, 10:25] = 250
        pixels[12:18, 24] = 40
        pixels[14, 24] = 250  # a gap of one pixel
        with pytest.warns(UserWarning, match="plain background"):
            found = object_mask(pixels)
        assert np.array_equal(found, pixels == 40)

    @pytest.mark.parametrize(
        ("picture", "message"),
        [
            (RGBA[..., :3], "p must have a transparent or a plain background"),
            (np.full((9, 7, 3), 255, np.uint8), "object of 1% to 95% .* background it is 0.0%"),
            (np.dstack([COLOURS, np.zeros_like(SHAPE)]), "by the alpha channel it is 0.0%"),
            (np.zeros((2, 9, 7, 3)), "p must be one picture, got 2"),
        ],
    )
    def test_refused(self, picture, message):
        with pytest.raises(ValueError, match=message):
            object_mask(picture, "p")
