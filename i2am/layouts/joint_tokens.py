"""What the layouts of joint transformers share: whose pipeline it is, which pictures, what fits."""

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from i2am.attribution.grid import Grid
from i2am.layouts.spans import GENERATED, REFERENCE, Role, Sequences
from i2am.layouts.token_layout import AttentionCall, Frame

Part = tuple[str, Role, Sequence[int]]
"""Name, role and grid of a span, for :func:`i2am.layouts.spans.in_order`."""
Picture = tuple[Role, Sequence[int]]
"""Role and grid."""

# why a pipeline has no reference tokens
PROMPT = "it makes an image of its prompt alone"
LATENTS = "its image enters as latents of the generated tokens, not as tokens of its own"
CHANNELS = "its image enters as input channels, which attention does not see"
CONTROLNET = "its image enters through a ControlNet, whose attention is another module's"
ALONE = "its tokens are those of the generated image and of the text"

CAVEATS = (
    "each layer tells of its own attention alone: what a reference gives to the image by way of "
    "the text is not seen; the first tokens of the text and its padding draw attention, so compare "
    "shares within one model, not between models"
)


def known_reason(pipe: Any, denoiser: nn.Module, known: Mapping[str, str]) -> str | None:
    """Why a pipeline has no reference tokens, ``""`` where it may have some.

    Args:
        pipe: The pipeline, or the denoiser itself where there is none.
        denoiser: A transformer of diffusers.
        known: The reasons, by the names of the pipelines whose order of tokens is known.

    Returns:
        ``None`` where the order is not known: another pipeline, or a ``forward`` of one's own.
    """
    own = next(cls for cls in type(denoiser).__mro__ if "forward" in vars(cls))
    if own.__module__.partition(".")[0] != "diffusers":
        return None
    if pipe is denoiser:
        return ""
    return next((known[cls.__name__] for cls in type(pipe).__mro__ if cls.__name__ in known), None)


def text_length(frame: Frame) -> int:
    """Number of text tokens, padding included."""
    return int(frame.arguments["encoder_hidden_states"].shape[1])


def pictures_of(frame: Frame) -> list[Picture]:
    """The pictures that ``img_ids`` tell of, in order: number 0 is generated, others references.

    Raises:
        ValueError: They are not in row-major order, or none or several have number 0.
    """
    found = frame.once(frame.arguments["img_ids"], _pictures)
    numbers = [number for number, _ in found]
    if numbers.count(0) != 1:
        raise ValueError(
            "layout expects img_ids to number the generated picture 0 and references otherwise, "
            f"got pictures {', '.join(f'{number:g}' for number in numbers)}"
        )
    return [(GENERATED if number == 0 else REFERENCE, grid) for number, grid in found]


def numbered(*pictures: Picture) -> list[Part]:
    """Parts of pictures; several references are counted from 1."""
    several = sum(role == REFERENCE for role, _ in pictures) > 1
    numbers = count(1)
    return [
        (f"{role} {next(numbers)}" if several and role == REFERENCE else role, role, grid)
        for role, grid in pictures
    ]


def refuse_references(parts: Sequence[Part], reason: str) -> None:
    """Refuse pictures where a pipeline is known to have no reference tokens.

    Raises:
        ValueError: There is a reason why there should be none, and there are some.
    """
    found = [name for name, role, _ in parts if role == REFERENCE]
    if reason and found:
        raise ValueError(
            f"layout expects no reference tokens, because {reason}, got {', '.join(found)}"
        )


def no_reference(pipe: Any, reason: str) -> str:
    """The sentence of a layout that says why there are no reference tokens, if there are none."""
    return reason and f"{type(pipe).__name__} has no reference tokens: {reason}"


def _pictures(ids: Tensor) -> tuple[tuple[float, Grid], ...]:
    """Number and grid of every picture of ``[seqlen, 3 or more]`` (number, row, column) ids.

    Ids may be bfloat16, where numbers above 256 are rounded: the width is how often the first row
    is told, never a largest number.
    """
    ids = (ids[0] if ids.ndim == 3 else ids).detach().cpu().double()
    runs = torch.unique_consecutive(ids[:, 0], return_counts=True)
    pictures, start = [], 0
    for number, tokens in zip(*(run.tolist() for run in runs), strict=True):
        places = ids[start : start + tokens, 1:3]
        width = int(torch.unique_consecutive(places[:, 0], return_counts=True)[1][0])
        if tokens % width or not _is_row_major(places.view(-1, width, 2)):
            raise ValueError(
                "layout expects img_ids to tell the rows of each picture from top to bottom, and "
                f"each from left to right, got another order in picture {number:g}"
            )
        pictures.append((number, (tokens // width, width)))
        start += tokens
    return tuple(pictures)


def _is_row_major(places: Tensor) -> bool:
    rows, columns = places.unbind(-1)
    return bool(
        (rows == rows[:, :1]).all()
        and (rows.diff(dim=0) >= 0).all()
        and (columns == columns[:1]).all()
        and (columns.diff(dim=1) >= 0).all()
        and (columns[:, :2].diff(dim=1) > 0).all()
    )


def checked(call: AttentionCall, sequences: Sequences, calls: int = 1) -> Sequences:
    """The sequences, if a call is as long as they say.

    Args:
        call: The call.
        sequences: Spans that name its last query and its last key.
        calls: How many calls a layer may make.

    Raises:
        ValueError: It is longer or shorter, or a call too many.
    """
    if call.call_index >= calls:
        raise ValueError(
            f"layout expects {calls} attention call{'s' * (calls > 1)} of a layer, got call "
            f"{call.call_index + 1} of {call.layer}"
        )
    for kind, spans, seqlen in (
        ("queries", sequences.query, call.seqlen_q),
        ("keys", sequences.key, call.seqlen_k),
    ):
        expected = spans[-1].stop
        if expected != seqlen:
            sizes = " + ".join(f"{span.stop - span.start} {span.name}" for span in spans)
            raise ValueError(
                f"layout expects {sizes} = {expected} {kind}, got {seqlen} in {call.layer}"
            )
    return sequences
