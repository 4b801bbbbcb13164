"""Frames of a Wan video that are given, and that the generated frames attend to."""

from typing import Any

from i2am.layouts.spans import Role, Sequences, Span
from i2am.layouts.token_layout import AttentionCall, Frame, TokenLayout
from i2am.layouts.wan import FRAMES, video_grid

# anchored: the control blocks of VACE have layers of these names too
LAYERS = r"^blocks\.\d+\.attn1$"


def first_frame(**options: Any) -> TokenLayout:
    """Self-attention of image-to-video: the first latent frame is the reference, the others attend.

    Args:
        **options: Those of :class:`TokenLayout`.

    Example:
        >>> i2am.record(pipe, layout=first_frame())  # doctest: +SKIP
    """
    note = f"{FRAMES}; the first is denoised like the others unless the pipeline keeps it clean"
    return _leading("first_frame", ("first frame",), note, options)


def reference_frames(number: int, **options: Any) -> TokenLayout:
    """Self-attention of Wan-VACE: frames of reference pictures in front of the video.

    Args:
        number: How many reference pictures the pipeline is given: the transformer is not told.
        **options: Those of :class:`TokenLayout`.

    Raises:
        ValueError: There is none.
    """
    if number < 1:
        raise ValueError(f"number must be at least 1, got {number}")
    # the pipeline puts every picture in front of those before it
    names = tuple(f"reference {index}" for index in range(number, 0, -1))
    note = f"{FRAMES}, counted behind the reference frames; these are denoised like the others"
    return _leading("reference_frames", names if number > 1 else ("reference",), note, options)


def _leading(
    family: str, names: tuple[str, ...], note: str, options: dict[str, Any]
) -> TokenLayout:
    def spans(call: AttentionCall, frame: Frame) -> Sequences | None:
        grid = video_grid(call, frame)
        if call.seqlen_k != call.seqlen_q:
            raise ValueError(
                f"layout expects self-attention, whose queries are its keys too, got "
                f"{call.seqlen_q} queries and {call.seqlen_k} keys in {call.layer}"
            )
        if grid[0] <= len(names):
            raise ValueError(
                f"layout expects latent frames behind the first {len(names)}, got {grid[0]} in all"
            )

        def part(name: str, role: Role, first: int, stop: int) -> Span:
            return Span(name, role, 0, grid, ((first, stop), (0, grid[1]), (0, grid[2])))

        given = [part(name, "reference", i, i + 1) for i, name in enumerate(names)]
        both = (*given, part("generated", "generated", len(names), grid[0]))
        return Sequences(both, both)

    defaults = {"layers": LAYERS, "note": note, "sums": "resized"}
    return TokenLayout(f"wan {family}", spans, **{**defaults, **options})
