"""What maps lie over: the pictures of a run, and the part of each that became tokens."""

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Which = Literal["generated", "reference"]
Box = tuple[float, float, float, float]
"""Top, left, height and width as fractions of a picture; may reach beyond it."""

_BOX = re.compile(r"(\d+),(\d+),(\d+),(\d+)@(\d+)x(\d+)")
_PATCH = re.compile(r"(\d+),(\d+)@(\d+)x(\d+)")


class Seen(NamedTuple):
    """A picture as the model saw it.

    Attributes:
        size: (height, width) of the picture that a mask belongs to, in any unit; None if unknown.
        box: The part of it that became tokens; None is all of it.
    """

    size: tuple[int, int] | None = None
    box: Box | None = None


def seen(provenance: Mapping[str, Any], which: Which) -> Seen | None:
    """What the provenance of maps says of a picture.

    Args:
        provenance: `AttributionMaps.provenance`.
        which: "generated" for what masks of ``record(mask=)`` belong to, or "reference".

    Returns:
        None where it says nothing.

    Raises:
        ValueError: Results were merged whose pictures became tokens in different parts.
    """
    parts = [provenance, *provenance.get("merged", [])]
    found = [part["pictures"][which] for part in parts if "pictures" in part]
    if not found:
        return None
    boxes = {one["box"] and tuple(one["box"]) for one in found}
    if len(boxes) > 1:
        raise ValueError(
            f"maps must be of samples whose {which} pictures were cropped alike, got merged ones "
            "that were not; take them one by one"
        )
    sizes = {one["size"] and tuple(one["size"]) for one in found}
    return Seen(sizes.pop() if len(sizes) == 1 else None, boxes.pop())


def cut_place(
    place: tuple[float, float] | None, provenance: Mapping[str, Any]
) -> tuple[float, float] | None:
    """A place on the reference, fractions of it, as fractions of the part that became tokens.

    Args:
        place: Down and right, or None.
        provenance: `AttributionMaps.provenance`.

    Returns:
        None for None, and for a place outside that part.
    """
    picture = seen(provenance, "reference")
    if place is None or picture is None or picture.box is None:
        return place
    top, left, height, width = picture.box
    y, x = (place[0] - top) / height, (place[1] - left) / width
    return (y, x) if min(y, x) >= 0 and max(y, x) <= 1 else None


def region_box(provenance: Mapping[str, Any], name: str) -> Box | None:
    """What a region covers of the generated image.

    Args:
        provenance: `AttributionMaps.provenance` of a recording with that region.
        name: Its name.

    Returns:
        None for a region of free weights, which has no rectangle.
    """
    # a region without an entry is named by what it is
    text = str((provenance.get("regions") or {}).get(name, name))
    if found := _BOX.fullmatch(text):
        top, left, tall, wide, height, width = map(int, found.groups())
        return top / height, left / width, tall / height, wide / width
    if found := _PATCH.fullmatch(text):
        row, column, height, width = map(int, found.groups())
        return row / height, column / width, 1 / height, 1 / width
    return None
