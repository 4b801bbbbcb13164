"""Masks of what a picture shows, from its alpha channel or its plain background."""

from pathlib import Path
from typing import TYPE_CHECKING

from i2am.data.images import ImageRejected, as_rgb, load, upright

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

_PLAIN = 16  # levels that JPEG and the light move a plain background by
_PLAIN_SHARE = 0.95  # an object may touch the frame
_OBJECT = (0.01, 0.95)


def find_object(image: "Image", name: str = "image") -> tuple["Image", str]:
    """The object in a picture, where its alpha channel or a plain background shows it.

    An alpha channel that is not opaque decides alone. Else the background is what has the colour
    of the outermost pixels and is joined with them; the object is the rest.

    Args:
        image: As for `as_rgb`.
        name: What the caller calls it; it begins the error message.

    Returns:
        A mask like those of `as_black_and_white`, and what it was made from, in words.

    Raises:
        ImageRejected: As for `as_rgb`, or, with the code ``no_object``: the picture has neither, or
            what would be the object is less than 1 % or more than 95 % of it.
    """
    import numpy as np
    from PIL import Image

    image = upright(image, name)
    inside, source = None, "the alpha channel"
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
        inside = alpha >= 128 if (alpha < 128).any() else None
    if inside is None:
        source = "the plain background"
        pixels = np.asarray(as_rgb(image, name)).astype(np.int16)
        frame = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        off = np.abs(pixels - np.median(frame, axis=0)).max(axis=-1)
        rim = np.concatenate([off[0], off[-1], off[:, 0], off[:, -1]]) <= _PLAIN
        if rim.mean() < _PLAIN_SHARE:
            raise ImageRejected(
                f"{name} must have a transparent or a plain background to find its object in, "
                f"{1 - rim.mean():.0%} of its outermost pixels have another colour than the rest",
                "no_object",
            )
        inside = ~_joined_with_frame(off <= _PLAIN)
    share = float(inside.mean())
    if not _OBJECT[0] <= share <= _OBJECT[1]:
        raise ImageRejected(
            f"{name} must show an object of {_OBJECT[0]:.0%} to {_OBJECT[1]:.0%} of its pixels to "
            f"make a mask of, by {source} it is {share:.1%}",
            "no_object",
        )
    return Image.fromarray(inside.astype(np.uint8) * 255), f"{source}: {share:.0%} of the picture"


def read_object_mask(
    path: str | Path, *, name: str = "image", content: bytes | None = None
) -> tuple["Image", str]:
    """`find_object` in an image file.

    Args:
        path, name, content: As for `read_image`.

    Raises:
        ImageRejected: As for `read_image` and `find_object`.
    """
    return find_object(load(Path(path), name, content), f"{name} {path}")


def _joined_with_frame(plain: "NDArray[np.bool_]") -> "NDArray[np.bool_]":
    """Those pixels of ``[height, width]`` from which a way over others leads to the frame."""
    import numpy as np

    def runs(across: "NDArray[np.bool_]") -> "NDArray[np.int64]":
        """A number for every stretch of equal pixels of a row."""
        starts = np.ones(across.shape, dtype=bool)
        starts[:, 1:] = across[:, 1:] != across[:, :-1]
        return np.cumsum(starts).reshape(across.shape)

    joined = plain.copy()
    joined[1:-1, 1:-1] = False
    lines = (runs(plain), runs(plain.T).T)
    while True:
        before = int(joined.sum())
        for run in lines:
            reached = np.zeros(plain.size + 1, dtype=bool)
            reached[run[joined]] = True
            joined = plain & reached[run]
        if int(joined.sum()) == before:
            return joined
