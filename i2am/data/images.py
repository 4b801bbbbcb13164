"""Reading images and masks from files, decoded and checked whole before anything else starts.

A file is read once: `read_bytes` hands out what `read_image` and `read_mask` decode. Every refusal
is an `ImageRejected` with one sentence; only the disk's own faults stay `OSError`.

`as_rgb` and `as_black_and_white` are what becomes of a decoded picture, from a file or not;
`i2am.data.arrays` is for all else that Python has for one.
"""

import logging
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from i2am import files
from i2am.files import FileRejected, FileTooLarge

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 50_000_000
MAX_BYTES = 512 * 2**20  # twice MAX_PIXELS uncompressed; keeps a checkpoint from being read whole
# not all that Pillow knows: it would start Ghostscript for an EPS file
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
_BLACK, _WHITE = 64, 191  # what JPEG or an interpolation leaves of black and white is within
_GREY_SHARE = 0.1  # soft edges of a mask are less
_ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
_BITS_PER_SAMPLE = 258  # the TIFF tag: bits of each channel

log = logging.getLogger(__name__)
_told: set[str] = set()


class ImageRejected(ValueError):
    """A file that is no usable image or mask. The message is one sentence naming the file.

    Attributes:
        code: ``missing``, ``unidentified_image`` (no image of `FORMATS`, also a folder or a pipe),
            ``truncated``, ``damaged``, ``too_large``, ``deep`` (more than 8 bits per channel),
            ``size`` (not that of its image), ``aspect`` (another shape than asked for),
            ``empty_mask`` (all black), ``full_mask`` (all white) or ``no_object`` (nothing that a
            mask could be made of).
    """

    def __init__(self, message: str, code: str = "damaged") -> None:
        # both, so that a copy from another process has the code
        super().__init__(message, code)
        self.code = code

    def __str__(self) -> str:
        return str(self.args[0])


def read_bytes(path: str | Path, *, name: str = "image") -> bytes:
    """The whole content of an image file, undecoded.

    Args:
        path: A regular file or a link to one.
        name: What the caller calls this input; it begins the error message.

    Raises:
        ImageRejected: The file is missing, a folder, a pipe or device, or larger than 512 MiB.
    """
    try:
        return files.read_bytes(path, what=f"{name} {path}", limit=MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise ImageRejected(f"{name} {path} does not exist", "missing") from None
    except FileTooLarge as error:
        raise ImageRejected(str(error), "too_large") from error
    except FileRejected as error:
        raise ImageRejected(str(error), "unidentified_image") from error


def read_image(path: str | Path, *, name: str = "image", content: bytes | None = None) -> "Image":
    """Read an image file as RGB, upright (EXIF), with transparency laid over white.

    Args:
        path: The file: PNG, JPEG, WEBP, BMP, TIFF or GIF, of at most 8 bits per channel.
        name: What the caller calls this input; it begins the error message.
        content: What `read_bytes` returned for it; None reads the file.

    Returns:
        A fully decoded PIL image of mode RGB.

    Raises:
        ImageRejected: As for `read_bytes`; or the content is no image of these formats, damaged,
            larger than 50 megapixels or of more than 8 bits per channel.
    """
    image = load(Path(path), name, content)
    if image.mode != "RGB":
        _tell_once(f"of mode {image.mode} are converted to RGB", path)
    return as_rgb(image, f"{name} {path}")


def read_mask(
    path: str | Path,
    *,
    name: str = "mask",
    size: tuple[int, int] | None = None,
    content: bytes | None = None,
    allow_uniform: bool = False,
) -> "Image":
    """Read a mask file as `as_black_and_white` makes it.

    Args:
        path: The file, as for `read_image`.
        name: What the caller calls this input; it begins the error message.
        size: ``(width, height)`` that the mask must have; None takes any.
        content: As for `read_image`.
        allow_uniform: Whether a mask may be all black or all white.

    Returns:
        A PIL image of mode L that holds 0 and 255, both unless `allow_uniform`, and nothing else.

    Raises:
        ImageRejected: As for `read_image`; or the size differs; or the mask is all black or all
            white and that is not allowed.
    """
    mask = as_black_and_white(load(Path(path), name, content), f"{name} {path}")
    if size is not None and mask.size != size:
        swapped = mask.size == size[::-1]
        raise ImageRejected(
            f"{name} {path} must be {_pixels(size)} like its image, got {_pixels(mask.size)}"
            + (": width and height look swapped" if swapped else ""),
            "size",
        )
    low, high = mask.getextrema()
    if low == high and not allow_uniform:
        colour, code = ("white", "full_mask") if low else ("black", "empty_mask")
        raise ImageRejected(
            f"{name} {path} must have black and white pixels, all of it is {colour}", code
        )
    return mask


def looks_like_mask(path: str | Path, *, content: bytes | None = None) -> bool:
    """Whether nearly all pixels of a file are nearly black or nearly white.

    A photo, a drawing in colours or a depth map is not so, although `read_mask` makes a mask of it.

    Args:
        path: The file, one that `read_mask` accepts.
        content: As for `read_image`.

    Raises:
        ImageRejected: As for `read_image`.
    """
    return is_black_and_white(load(Path(path), "mask", content))


def as_rgb(image: "Image", name: str = "image", *, background: str = "white") -> "Image":
    """A decoded picture of any mode as RGB, upright (EXIF), without transparency.

    Args:
        image: A PIL image of at most 8 bits per channel.
        name: What the caller calls it; it begins the error message.
        background: Colour that transparent pixels are laid over.

    Returns:
        A PIL image of mode RGB; `image` itself is not changed.

    Raises:
        ImageRejected: It has more than 8 bits per channel, or cannot be converted.
    """
    return _over(upright(image, name), background=background)


def as_black_and_white(image: "Image", name: str = "mask") -> "Image":
    """A decoded picture as a mask: pixels of half brightness and more become 255, the others 0.

    Transparent pixels count as black. Where 1 is the largest value, it is white: such masks hold 0
    and 1.

    Args:
        image: As for `as_rgb`.
        name: What the caller calls it; it begins the error message.

    Returns:
        A PIL image of mode L that holds 0 and 255 alone; upright.

    Raises:
        ImageRejected: As for `as_rgb`.
    """
    grey = as_rgb(image, name, background="black").convert("L")
    white = 1 if grey.getextrema()[1] == 1 else 128
    return grey.point([0] * white + [255] * (256 - white))


def is_black_and_white(image: "Image") -> bool:
    """Whether nearly all pixels of a decoded picture are nearly black or nearly white."""
    from PIL import ImageChops

    image = as_rgb(image, "mask", background="black")
    red, green, blue = image.split()
    highest = ImageChops.lighter(ImageChops.lighter(red, green), blue).histogram()
    lowest = ImageChops.darker(ImageChops.darker(red, green), blue).histogram()
    clear = sum(highest[: _BLACK + 1]) + sum(lowest[_WHITE:])
    return clear >= (1 - _GREY_SHARE) * image.width * image.height


def upright(image: "Image", name: str = "image") -> "Image":
    """A decoded picture of at most 8 bits per channel, turned as its EXIF data say.

    Raises:
        ImageRejected: It has more bits.
    """
    from PIL import ImageOps

    # before it is decoded, which leaves 8 of 16 bits
    if (bits := _bits(image)) > 8:
        raise ImageRejected(f"{name} must have at most 8 bits per channel, it has {bits}", "deep")
    return ImageOps.exif_transpose(image)


def load(path: Path, name: str, content: bytes | None) -> "Image":
    """A picture as its file has it, decoded and upright; arguments and errors of `read_image`."""
    from PIL import Image

    if content is None:
        content = read_bytes(path, name=name)
    bomb = (Image.DecompressionBombWarning, Image.DecompressionBombError)
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            # the header alone has been read so far; that Pillow may have warned of a bomb is not
            # made an error, because filters of warnings are shared with other threads
            if image.width * image.height > MAX_PIXELS:
                raise ImageRejected(
                    f"{name} {path} must have at most {MAX_PIXELS // 10**6} megapixels, "
                    f"its header says {_pixels(image.size)}",
                    "too_large",
                )
            turned = upright(image, f"{name} {path}")
            if image.getexif().get(_ORIENTATION, 1) != 1:
                _tell_once("that their EXIF data call rotated are turned upright", path)
            return turned
    except (ImageRejected, MemoryError):
        raise
    except bomb as error:
        raise ImageRejected(
            f"{name} {path} must have at most {MAX_PIXELS // 10**6} megapixels, it has far more",
            "too_large",
        ) from error
    except Image.UnidentifiedImageError as error:
        raise ImageRejected(
            f"{name} {path} is not an image that can be read: {', '.join(FORMATS)}",
            "unidentified_image",
        ) from error
    except Exception as error:
        # decoders raise what they like on damaged data: bare OSError, SyntaxError, struct.error
        reason = str(error).strip().rstrip(".") or type(error).__name__
        code = "truncated" if "truncated" in reason else "damaged"
        raise ImageRejected(f"{name} {path} is damaged: {reason}", code) from error


def _bits(image: "Image") -> int:
    """Bits of a channel. An undecoded file knows better than the mode: Pillow cuts RGB to 8."""
    from PIL.ImageFile import ImageFile
    from PIL.TiffImagePlugin import TiffImageFile

    if isinstance(image, TiffImageFile):
        return max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
    if image.mode in ("I", "F"):
        return 32
    # as the decoder is told: "RGB;16B"; in other formats than PNG such a number is of a pixel
    tiles = image.tile if isinstance(image, ImageFile) and image.format == "PNG" else []
    deep = any(";16" in str(tile[3]) for tile in tiles)
    return 16 if deep or image.mode.startswith("I;16") else 8


def _over(image: "Image", *, background: str) -> "Image":
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    canvas = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")


def _tell_once(what: str, path: str | Path) -> None:
    if what not in _told:
        _told.add(what)
        log.info("images %s, %s is the first", what, path)


def _pixels(size: tuple[int, int]) -> str:
    width, height = size
    return f"{width} x {height} pixels"
