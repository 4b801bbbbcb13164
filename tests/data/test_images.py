import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from i2am.data.images import (
    FORMATS,
    MAX_BYTES,
    MAX_PIXELS,
    ImageRejected,
    looks_like_mask,
    read_bytes,
    read_image,
    read_mask,
)

# what a test makes of them is its own matter
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


def save(path, array, mode=None, **options):
    image = Image.fromarray(np.asarray(array, dtype=np.uint8))
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def png(width, height, *, bits=8, colour=2, data=b"", palette=None):
    """A PNG written by hand."""

    def chunk(name, body=b""):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    chunks = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    if palette is not None:
        chunks += chunk(b"PLTE", palette)
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IDAT", data) + chunk(b"IEND")


def png_header(width, height):
    """A PNG of a few bytes that claims a size; its pixels are not there."""
    return png(width, height)


def tiff(data, *, bits, photometric, order="<", planes=1, deflated=False, extra=None, kind=1):
    """A TIFF of 4 x 4 pixels written by hand: one strip, or one for each of several planes."""
    strips = [zlib.compress(data) if deflated else data] * planes
    lists = {258: bits, 339: (kind,) * len(bits)}
    if extra is not None:
        lists[338] = (extra,)
    if photometric == 3:
        lists[320] = tuple(range(0, 65536, 65536 // 2 ** bits[0])) * 3
    single = {256: 4, 257: 4, 259: 8 if deflated else 1, 262: photometric, 277: len(bits), 278: 4}
    single[284] = 2 if planes > 1 else 1
    tags = {tag: (value,) for tag, value in single.items()} | lists
    offsets, sizes = [], [len(strip) for strip in strips]
    body = b""
    for strip in strips:
        offsets.append(8 + len(body))
        body += strip + b"\0" * (len(strip) % 2)
    entries = b""
    shorts = {tag: ("H", 3, values) for tag, values in tags.items()}
    for tag, (code, number, values) in sorted(
        (shorts | {273: ("I", 4, offsets), 279: ("I", 4, sizes)}).items()
    ):
        packed = struct.pack(f"{order}{len(values)}{code}", *values)
        if len(packed) > 4:
            at, body = 8 + len(body), body + packed
            packed = struct.pack(f"{order}I", at)
        entries += struct.pack(f"{order}HHI", tag, number, len(values)) + packed.ljust(4, b"\0")
    magic = b"II" if order == "<" else b"MM"
    header = magic + struct.pack(f"{order}HI", 42, 8 + len(body))
    return header + body + struct.pack(f"{order}H", len(entries) // 12) + entries + b"\0" * 4


@pytest.fixture
def half(tmp_path):
    """A mask whose right half is white, 6 wide and 4 high."""
    mask = np.zeros((4, 6))
    mask[:, 3:] = 255
    return save(tmp_path / "mask.png", mask)


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK", "1"])
def test_every_common_mode_becomes_rgb(tmp_path, mode):
    path = save(tmp_path / "x.tif", np.full((4, 6), 255), mode)
    image = read_image(path)
    assert (image.mode, image.size) == ("RGB", (6, 4))
    assert (np.asarray(image) == 255).all()


# colour type, its samples per pixel, and the depths that PNG has for it
PNGS = [
    *((0, 1, bits) for bits in (1, 2, 4, 8, 16)),
    *((3, 1, bits) for bits in (1, 2, 4, 8)),
    *((kind, samples, bits) for kind, samples in ((2, 3), (4, 2), (6, 4)) for bits in (8, 16)),
]


@pytest.mark.parametrize(("colour", "samples", "bits"), PNGS)
def test_png_of_every_colour_type_and_depth(tmp_path, colour, samples, bits):
    row = b"\0" + b"\xff" * (4 * samples * bits // 8 or 1)
    palette = b"\xff" * 3 * 2**bits if colour == 3 else None
    path = tmp_path / "x.png"
    path.write_bytes(
        png(4, 4, bits=bits, colour=colour, data=zlib.compress(row * 4), palette=palette)
    )
    if bits <= 8:
        assert (np.asarray(read_image(path)) == 255).all()
        return
    for read in (read_image, read_mask):
        with pytest.raises(ImageRejected, match="at most 8 bits per channel, it has 16") as caught:
            read(path)
        assert caught.value.code == "deep"


# photometric interpretation, samples per pixel, extra samples
TIFFS = {
    "white-is-zero": (0, 1, None),
    "grey": (1, 1, None),
    "grey-alpha": (1, 2, 2),
    "rgb": (2, 3, None),
    "rgbx": (2, 4, 0),
    "rgba-premultiplied": (2, 4, 1),
    "rgba": (2, 4, 2),
    "palette": (3, 1, None),
    "cmyk": (5, 4, None),
    "ycbcr": (6, 3, None),
    "lab": (8, 3, None),
}
SHALLOW = [
    *((name, 8) for name in TIFFS),
    *((name, bits) for name in ("white-is-zero", "grey", "palette") for bits in (1, 2, 4)),
]


@pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])
@pytest.mark.parametrize("deflated", [False, True], ids=["plain", "deflated"])
@pytest.mark.parametrize(("name", "bits"), SHALLOW)
def test_tiff_of_up_to_8_bits_is_read(tmp_path, name, bits, deflated, order):
    photometric, samples, extra = TIFFS[name]
    path = tmp_path / "x.tif"
    content = tiff(
        b"\xff" * (4 * max(1, 4 * samples * bits // 8)),
        bits=(bits,) * samples,
        photometric=photometric,
        extra=extra,
        deflated=deflated,
        order=order,
    )
    path.write_bytes(content)
    assert read_image(path).size == (4, 4)


DEEP = [
    *((name, bits, 1) for name in TIFFS for bits in (10, 12, 16, 32)),
    # signed and floating numbers
    *(("grey", bits, kind) for bits, kind in ((16, 2), (32, 2), (32, 3), (64, 3))),
    *(("rgb", bits, 3) for bits in (16, 32)),
]


@pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])
@pytest.mark.parametrize("planes", ["one", "deflated", "planes"])
@pytest.mark.parametrize(("name", "bits", "kind"), DEEP)
def test_no_tiff_of_more_bits_is_cut(tmp_path, name, bits, kind, planes, order):
    """Some of these Pillow cannot read at all; none may come out as an image."""
    photometric, samples, extra = TIFFS[name]
    path = tmp_path / "x.tif"
    apart = samples if planes == "planes" else 1
    content = tiff(
        b"\x12" * (4 * 4 * samples * bits // 8 // apart),
        bits=(bits,) * samples,
        photometric=1 if photometric == 3 else photometric,
        extra=extra,
        planes=apart,
        deflated=planes == "deflated",
        order=order,
        kind=kind,
    )
    path.write_bytes(content)
    with pytest.raises(ImageRejected) as caught:
        read_image(path)
    assert caught.value.code in ("deep", "unidentified_image")
    try:
        Image.open(path)
    except OSError:
        return
    assert caught.value.code == "deep"
    assert f"8 bits per channel, it has {bits}" in str(caught.value)


@pytest.mark.parametrize("name", ["rgb", "rgba", "rgbx", "cmyk", "grey"])
def test_tiff_of_16_bits_is_what_pillow_would_have_read(tmp_path, name):
    """Else the test before were of files that are refused in any case."""
    photometric, samples, extra = TIFFS[name]
    path = tmp_path / "x.tif"
    data = b"\x12" * 32 * samples
    path.write_bytes(tiff(data, bits=(16,) * samples, photometric=photometric, extra=extra))
    with Image.open(path) as image:
        image.load()
    with pytest.raises(ImageRejected, match="it has 16"):
        read_image(path)


@pytest.mark.parametrize("bits", [1, 4, 8, 16, 24, 32])
def test_bits_of_a_pixel_of_a_bmp_are_not_those_of_a_channel(tmp_path, bits):
    colours = b"\xff" * 4 * (2**bits if bits <= 8 else 0)
    row = b"\xff" * (4 * -(-4 * bits // 32))
    head = struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, bits, 0, len(row) * 4, 0, 0, 0, 0)
    start = 14 + len(head) + len(colours)
    content = struct.pack("<2sIHHI", b"BM", start + len(row) * 4, 0, 0, start) + head + colours
    path = tmp_path / "x.bmp"
    path.write_bytes(content + row * 4)
    assert (np.asarray(read_image(path)) >= 248).all()


@pytest.mark.parametrize("mode", ["RGB", "YCbCr", "CMYK", "L"])
def test_jpeg_of_every_mode_is_read(tmp_path, mode):
    path = tmp_path / "x.jpg"
    Image.new(mode, (4, 4)).save(path)
    assert read_image(path).size == (4, 4)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_listed_format_is_read(tmp_path, kind):
    path = tmp_path / "x"
    Image.new("RGB", (6, 4), "white").save(path, format=kind)
    assert np.asarray(read_image(path)).min() >= 250


def test_a_file_is_read_once(half):
    content = read_bytes(half)
    digest = sha256(half.read_bytes()).hexdigest()
    half.unlink()
    assert sha256(content).hexdigest() == digest
    assert read_image(half, content=content).size == (6, 4)
    assert read_mask(half, content=content, size=(6, 4)).getextrema() == (0, 255)
    with pytest.raises(ImageRejected, match=r"^person .* is damaged"):
        read_image(half, name="person", content=content[:50])


def test_transparency_lies_over_white_in_images_and_counts_as_black_in_masks(tmp_path):
    pixels = np.full((2, 2, 4), 255)
    pixels[0, :, 3] = 0
    path = save(tmp_path / "x.png", pixels)
    assert (np.asarray(read_image(path)) == 255).all()
    assert np.asarray(read_mask(path)).tolist() == [[0, 0], [255, 255]]


def test_camera_rotation_is_undone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    path = save(tmp_path / "x.jpg", np.zeros((4, 6, 3)), exif=exif)
    assert Image.open(path).size == (6, 4)
    assert read_image(path).size == (4, 6)


def test_mask_is_cut_at_half_brightness(tmp_path):
    path = save(tmp_path / "x.png", [[0, 127, 128, 255]])
    assert np.asarray(read_mask(path, size=(4, 1))).tolist() == [[0, 0, 255, 255]]


def test_pixel_cap_is_on_the_header_not_on_the_file(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(10_000, MAX_PIXELS // 10_000 + 1))
    with pytest.raises(ImageRejected, match="at most 50 megapixels, its header says 10000 x 5001"):
        read_image(path)


# 89 megapixels are what Pillow warns of, twice that what it refuses
@pytest.mark.parametrize("side", [9_000, 10_000, 14_000])
@pytest.mark.parametrize("action", ["error", "ignore"])
def test_a_bomb_is_refused_whatever_pillow_does(tmp_path, side, action):
    (tmp_path / "bomb.png").write_bytes(png_header(side, side))
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with pytest.raises(ImageRejected, match="at most 50 megapixels") as caught:
            read_image(tmp_path / "bomb.png")
    assert caught.value.code == "too_large"


def test_threads_keep_the_filters_of_warnings(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_header(10_000, 10_000))
    save(tmp_path / "good.png", np.zeros((64, 48, 3)))
    before = list(warnings.filters)

    def read(index):
        try:
            return read_image(tmp_path / ("good.png" if index % 2 else "bomb.png")).size
        except ImageRejected as error:
            return error.code

    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(read, range(200))] == ["too_large", (48, 64)] * 100
    assert list(warnings.filters) == before


def missing(folder):
    return folder / "absent.png"


def a_folder(folder):
    return folder


def a_pipe(folder):
    os.mkfifo(folder / "x.png")
    return folder / "x.png"


def a_device(_):
    return Path(os.devnull)


def many_bytes(folder):
    with (folder / "x.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # sparse: takes no room
    return folder / "x.png"


def postscript(folder):
    """What Pillow would hand to Ghostscript."""
    Image.new("RGB", (4, 4)).save(folder / "x.eps")
    return (folder / "x.eps").rename(folder / "x.png")


def text(folder):
    (folder / "x.jpg").write_text("no image")
    return folder / "x.jpg"


def empty(folder):
    (folder / "x.png").touch()
    return folder / "x.png"


def truncated(suffix):
    def make(folder):
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
        whole = save(folder / f"whole.{suffix}", noise).read_bytes()
        (folder / f"x.{suffix}").write_bytes(whole[: len(whole) // 2])
        return folder / f"x.{suffix}"

    return make


def sixteen_bits(folder):
    Image.fromarray(np.full((4, 4), 1000, dtype=np.uint16)).save(folder / "x.png")
    return folder / "x.png"


def floats(folder):
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(folder / "x.tif")
    return folder / "x.tif"


def huge(folder):
    (folder / "x.png").write_bytes(png_header(60_000, 60_000))
    return folder / "x.png"


@pytest.mark.parametrize(
    ("make", "code", "match"),
    [
        pytest.param(missing, "missing", "does not exist", id="missing"),
        pytest.param(
            a_folder, "unidentified_image", "is a folder, a file was expected", id="folder"
        ),
        pytest.param(
            a_pipe,
            "unidentified_image",
            "must be a regular file, it is a pipe or a device",
            id="pipe",
        ),
        pytest.param(
            a_device,
            "unidentified_image",
            "must be a regular file, it is a pipe or a device",
            id="device",
        ),
        pytest.param(
            many_bytes, "too_large", "at most 536,870,912 bytes, it has 536,870,913", id="bytes"
        ),
        pytest.param(
            postscript,
            "unidentified_image",
            "can be read: PNG, JPEG, WEBP, BMP, TIFF, GIF",
            id="postscript",
        ),
        pytest.param(text, "unidentified_image", "is not an image", id="text"),
        pytest.param(empty, "unidentified_image", "is not an image", id="empty"),
        pytest.param(truncated("jpg"), "truncated", "is damaged: .*truncated", id="truncated-jpg"),
        pytest.param(truncated("png"), "truncated", "is damaged", id="truncated-png"),
        pytest.param(sixteen_bits, "deep", "at most 8 bits per channel, it has 16", id="16-bit"),
        pytest.param(floats, "deep", "at most 8 bits per channel, it has 32", id="float"),
        pytest.param(huge, "too_large", "at most 50 megapixels", id="bomb"),
    ],
)
@pytest.mark.parametrize("read", [read_image, read_mask])
def test_bad_file_is_refused_in_one_sentence(tmp_path, make, code, match, read):
    path = make(tmp_path)
    with pytest.raises(ImageRejected, match=match) as caught:
        read(path, name="person")
    assert caught.value.code == code
    assert str(caught.value).startswith(f"person {path} ")
    assert "\n" not in str(caught.value)


def test_file_cut_at_any_byte_is_refused_or_whole(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3))
    whole = save(tmp_path / "whole.png", pixels).read_bytes()
    expected = np.asarray(read_image(tmp_path / "whole.png"))
    for length in range(len(whole)):
        (tmp_path / "x.png").write_bytes(whole[:length])
        try:
            image = read_image(tmp_path / "x.png")
        except ImageRejected:
            continue
        assert (np.asarray(image) == expected).all(), length


@pytest.mark.parametrize(
    ("pixels", "size", "code", "match"),
    [
        pytest.param(np.zeros((4, 6)), None, "empty_mask", "all of it is black", id="black"),
        pytest.param(np.full((4, 6), 255), None, "full_mask", "all of it is white", id="white"),
        pytest.param(np.full((4, 6), 100), None, "empty_mask", "all of it is black", id="grey"),
        pytest.param(
            np.eye(4) * 255,
            (4, 5),
            "size",
            "must be 4 x 5 pixels like its image, got 4 x 4 pixels",
            id="size",
        ),
    ],
)
def test_useless_mask_is_refused(tmp_path, pixels, size, code, match):
    path = save(tmp_path / "x.png", pixels)
    with pytest.raises(ImageRejected, match=match) as caught:
        read_mask(path, size=size)
    assert caught.value.code == code


@pytest.mark.parametrize("level", [0, 255])
def test_a_mask_of_one_colour_can_be_allowed(tmp_path, level):
    path = save(tmp_path / "x.png", np.full((4, 6), level))
    assert read_mask(path, allow_uniform=True).getextrema() == (level, level)
    with pytest.raises(ImageRejected, match="must be 6 x 5 pixels"):
        read_mask(path, size=(6, 5), allow_uniform=True)


def test_a_conversion_is_told_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("i2am.data.images._told", set())
    caplog.set_level("INFO", "i2am")
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a", "b"):
        read_image(save(tmp_path / f"{name}.jpg", np.zeros((4, 6)), exif=exif))
        read_image(save(tmp_path / f"{name}.tif", np.zeros((4, 6)), "CMYK"))
        read_image(save(tmp_path / f"{name}.png", np.zeros((4, 6)), "RGB"))
    assert caplog.messages == [
        f"images that their EXIF data call rotated are turned upright, {tmp_path}/a.jpg is the "
        "first",
        f"images of mode L are converted to RGB, {tmp_path}/a.jpg is the first",
        f"images of mode CMYK are converted to RGB, {tmp_path}/a.tif is the first",
    ]


def test_good_mask_passes_its_size_check(half):
    assert read_mask(half, size=(6, 4)).getextrema() == (0, 255)


# Masks that are none


def disc(soft=False):
    """A white disc on black, 64 x 64; its edge is as wide as a blur of two pixels makes it."""
    rows, columns = np.mgrid[:64, :64] - 31.5
    inside = 20 - np.hypot(rows, columns)
    return (inside.clip(-2, 2) / 4 + 0.5) * 255 if soft else (inside > 0) * 255


def photo(seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    ("pixels", "mode", "ending"),
    [
        (disc(), None, "png"),
        (disc(), "1", "png"),
        (disc(), "RGB", "png"),
        (disc(), "P", "gif"),
        (disc(), None, "jpg"),
        (disc(soft=True), None, "jpg"),
        (np.full((4, 6), 255), None, "png"),
    ],
    ids=["grey", "bits", "rgb", "palette", "jpeg", "soft-jpeg", "white"],
)
def test_masks_look_like_masks(tmp_path, pixels, mode, ending):
    assert looks_like_mask(save(tmp_path / f"x.{ending}", pixels, mode))


@pytest.mark.parametrize(
    ("pixels", "mode"),
    [
        (photo(), None),
        (photo(), "L"),
        (np.stack([disc(), 0 * disc(), 0 * disc()], -1), None),
        (np.stack([0 * disc(), disc(), 0 * disc()], -1), None),
        (np.dstack([photo(), disc()]), None),
        (np.mgrid[:64, :64][0] * 4, None),
    ],
    ids=["photo", "grey-photo", "red", "green", "cut-out", "gradient"],
)
def test_pictures_do_not(tmp_path, pixels, mode):
    path = save(tmp_path / "x.png", pixels, mode)
    assert not looks_like_mask(path)
    assert not looks_like_mask(tmp_path / "gone.png", content=path.read_bytes())


def test_what_cannot_be_read_is_neither(tmp_path):
    with pytest.raises(ImageRejected, match="does not exist"):
        looks_like_mask(tmp_path / "x.png")
