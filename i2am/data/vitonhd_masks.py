"""Whether masks are what they should be, before hours go into what they spoil."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from i2am.data.images import ImageRejected, looks_like_mask
from i2am.data.vitonhd_files import KINDS

if TYPE_CHECKING:
    from i2am.data.vitonhd import VitonHD

_GREY_TOLERANCE = 0.06  # JPEG moves the grey of 128 by a few levels of 255
_PAINTED = 0.3
_WHITE = {
    "mask": "is to be generated",
    "garment_mask": "shows the garment",
    "garment_region": "shows the garment",
    "warped_mask": "shows the garment",
}


def looks_inverted(mask: Tensor, agnostic: Tensor | None = None) -> bool:
    """Guesses whether a mask has 1 where it should have 0.

    What is to be generated is painted grey in the agnostic picture. Without one, or where that
    has no grey, the frame tells: what is masked lies inside of a picture.

    Args:
        mask: ``[height, width]`` in [0, 1]; above 0.5 counts as 1.
        agnostic: ``[3, height, width]`` in [0, 1], for a mask of what is to be generated.

    Returns:
        The guess; False for a mask of one colour.
    """
    white = mask > 0.5
    if white.all() or not white.any():
        return False
    if agnostic is not None:
        grey = ((agnostic - 128 / 255).abs().amax(dim=0) < _GREY_TOLERANCE).float()
        inside, outside = grey[white].mean(), grey[~white].mean()
        if max(inside, outside) > _PAINTED:
            return bool(outside > inside)
    frame = torch.cat([white[0], white[-1], white[1:-1, 0], white[1:-1, -1]])
    return bool(frame.float().mean() > 0.5)


def mask_warnings(data: "VitonHD", count: int = 16) -> tuple[str, ...]:
    """Looks at some masks of every kind.

    Args:
        data: The data set.
        count: How many pairs, spread evenly over it. Those that cannot be read are left out.

    Returns:
        For each kind a sentence if more than half of the masks look inverted, one if some are of
        one colour, on which scores are undefined, and one if some are pictures rather than masks.

    Raises:
        ValueError: If the count is below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    warnings = []
    picked = sorted({step * len(data) // count for step in range(count)})
    for name in data.names:
        if not KINDS[name].is_mask:
            continue
        inverted: list[int] = []
        uniform: list[int] = []
        pictures: list[int] = []
        seen = 0
        for index in picked:
            try:
                mask = data.read(name, index)
                agnostic = data.read("agnostic", index) if name == "mask" else None
            except ImageRejected:
                continue
            seen += 1
            line = data.pairs[index].line
            if not looks_like_mask(data.path(name, index)):
                pictures.append(line)
            if bool((mask == mask[0, 0]).all()):
                uniform.append(line)
            elif looks_inverted(mask, agnostic):
                inverted.append(line)
        folder = data.path(name, 0).parent.name
        if 2 * len(inverted) > seen:
            warnings.append(
                f"{len(inverted)} of {seen} masks of {folder} look inverted, the first that of "
                f"line {inverted[0]}: white must be what {_WHITE[name]}"
            )
        if uniform:
            warnings.append(
                f"{len(uniform)} of {seen} masks of {folder} are all black or all white once cut "
                f"at 128 of 255, the first that of line {uniform[0]}: their scores are undefined"
            )
        if pictures:
            warnings.append(
                f"{len(pictures)} of {seen} masks of {folder} look like pictures rather than "
                f"masks, the first that of line {pictures[0]}: their pixels of half brightness and "
                "more count as white"
            )
    return tuple(warnings)
