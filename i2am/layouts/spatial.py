"""Two pictures on one canvas that attends to itself, as CatVTON's person and garment."""

from typing import Any

from torch import nn

from i2am.layouts.cross_attention import generated_tokens, unet_layers
from i2am.layouts.spans import GENERATED, REFERENCE, Sequences, Span
from i2am.layouts.token_layout import AttentionCall, Frame, TokenLayout

_SIDES = {-2: "height", -1: "width"}
# the authors' classes, which are no diffusers pipelines; others may inherit and join otherwise
_AXES = {"CatVTONPipeline": -2, "CatVTONPix2PixPipeline": -1}

NOTE = (
    "generated and reference attend to each other on one canvas; the reference tokens hold noise "
    "too, from which the model makes the reference picture again"
)


def spatial_concatenation(axis: int = -2, generated: str = "first", **options: Any) -> TokenLayout:
    """Self-attention of a UNet over two pictures of one size, joined at an edge.

    Args:
        axis: -2 where one is above the other, -1 where they are side by side.
        generated: ``"first"`` where the upper or left one is generated, else ``"second"``.
        **options: Those of :class:`TokenLayout`.

    Example:
        >>> i2am.record(unet, layout=spatial_concatenation(axis=-1))  # doctest: +SKIP

    Raises:
        ValueError: There is no such axis or picture.
    """
    if axis not in _SIDES:
        raise ValueError(f"axis must be -2 (height) or -1 (width), got {axis!r}")
    if generated not in ("first", "second"):
        raise ValueError(f"generated must be 'first' or 'second', got {generated!r}")
    roles = (GENERATED, REFERENCE) if generated == "first" else (REFERENCE, GENERATED)

    def spans(call: AttentionCall, frame: Frame) -> Sequences | None:
        if call.seqlen_q != call.seqlen_k:
            raise ValueError(
                f"layout expects self-attention, whose queries are its keys too, got "
                f"{call.seqlen_q} queries and {call.seqlen_k} keys in {call.layer}"
            )
        canvas = generated_tokens(call, frame)
        if canvas is None:
            return None
        grid = canvas[0].grid
        half = _border(frame, grid, axis, call.layer)
        halves = []
        for role, first in zip(roles, (0, half), strict=True):
            box = [(0, side) for side in grid]
            box[axis] = (first, first + half)
            halves.append(Span(role, role, 0, grid, tuple(box)))
        return Sequences(tuple(halves), tuple(halves))

    defaults = {"layers": unet_layers("attn1"), "note": NOTE}
    name = f"spatial_concatenation {_SIDES[axis]}"
    return TokenLayout(name, spans, **{**defaults, **options})


def _border(frame: Frame, grid: tuple[int, ...], axis: int, layer: str) -> int:
    """How many rows or columns of a level belong to the first picture.

    Raises:
        ValueError: The border lies inside of one.
    """
    canvas = frame.size[axis] if frame.size else 0
    side, halvings = canvas, 0
    while side > grid[axis]:
        side, halvings = (side + frame.rounds_up) // 2, halvings + 1
    if canvas % (2 << halvings):
        raise ValueError(
            f"{_SIDES[axis]} of both pictures together must be a multiple of {2 << halvings} "
            f"latents, so that no token of {layer} shows both, got {canvas}"
        )
    return grid[axis] // 2


def catvton(pipe: Any, denoiser: nn.Module) -> TokenLayout | None:
    """The person, who is generated, comes first; the cross-attention of these models is skipped."""
    axis = _AXES.get(type(pipe).__name__)
    return None if axis is None else spatial_concatenation(axis)
