"""What maps lie over: the pictures of a run, and the part of each that became tokens."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Which = Literal["generated", "reference"]
Box = tuple[float, float, float, float]
"""Top, left, height and width as fractions of a picture; may reach beyond it."""


class Seen(NamedTuple):
    """A picture as the model saw it.

    Attributes:
        size: (height, width) of the picture that a mask belongs to, in any unit; None if unknown.
        box: The part of it that became tokens; None is all of it.
    """

    size: tuple[int, int] | None = None
    box: Box | None = None


def seen(provenance: Mapping[str, Any], which: Which) -> Seen:
    """What the provenance of maps says of a picture.

    Args:
        provenance: `AttributionMaps.provenance`.
        which: "generated" for what masks of ``record(mask=)`` belong to, or "reference".

    Raises:
        ValueError: Results were merged whose pictures became tokens in different parts.
    """
    parts = [provenance, *provenance.get("merged", [])]
    found = [part["pictures"][which] for part in parts if "pictures" in part]
    boxes = {one["box"] and tuple(one["box"]) for one in found}
    if len(boxes) > 1:
        raise ValueError(
            f"maps must be of samples whose {which} pictures were cropped alike, got merged ones "
            "that were not; take them one by one"
        )
    sizes = {one["size"] and tuple(one["size"]) for one in found}
    return Seen(sizes.pop() if len(sizes) == 1 else None, boxes.pop() if boxes else None)
