"""Spans: what consecutive tokens of a sequence stand for, by name, role and place."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from i2am.attribution.grid import Grid

Role = Literal["generated", "reference", "text", "other"]

GENERATED: Role = "generated"
REFERENCE: Role = "reference"
TEXT: Role = "text"
OTHER: Role = "other"


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of a sequence and what they show.

    Args:
        name: ``"generated"``, ``"reference 1"``, ``"text"``, ``"padding"``...; maps are read by it.
        role: ``"generated"``, ``"reference"``, ``"text"`` or ``"other"``.
        start: Index of the first token.
        grid: ``(n,)`` for tokens without a place; ``(height, width)`` or ``(frames, height,
            width)`` of the row-major grid that they form.
        box: For every axis of the grid ``(start, stop)``: the part that is meant, default all.

    Raises:
        ValueError: The role is unknown, there is no token, or the box leaves the grid.
    """

    name: str
    role: Role
    start: int
    grid: tuple[int, ...]
    box: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(f"role must be one of {', '.join(get_args(Role))}, got {self.role!r}")
        if self.start < 0 or not 1 <= len(self.grid) <= 3 or min(self.grid) < 1:
            raise ValueError(
                "start must be at least 0 and grid 1 to 3 numbers of at least 1, got "
                f"{self.start} and {self.grid} for {self.name!r}"
            )
        if self.box is not None:
            inside = len(self.box) == len(self.grid) and all(
                0 <= first < stop <= side
                for (first, stop), side in zip(self.box, self.grid, strict=True)
            )
            if not inside:
                raise ValueError(f"box must lie inside grid {self.grid}, got {self.box}")

    @property
    def size(self) -> tuple[int, ...]:
        """Grid of the tokens that are meant."""
        if self.box is None:
            return self.grid
        return tuple(stop - first for first, stop in self.box)

    @property
    def count(self) -> int:
        """Number of tokens that are meant."""
        return math.prod(self.size)

    @property
    def stop(self) -> int:
        """Index behind the last token of the whole grid."""
        return self.start + math.prod(self.grid)

    @property
    def place(self) -> Grid | None:
        """``(height, width)`` of the tokens that are meant, ``None`` where they have no place."""
        return None if len(self.size) == 1 else (self.size[-2], self.size[-1])

    @property
    def frames(self) -> int:
        """Number of video frames, 1 for a picture."""
        return self.size[0] if len(self.size) == 3 else 1

    @cached_property
    def index(self) -> slice | Tensor:
        """Where they are in the sequence: a slice wherever they are consecutive."""
        if self.box is None:
            return slice(self.start, self.stop)
        numbers = torch.arange(self.start, self.stop).view(self.grid)
        for axis, (first, stop) in enumerate(self.box):
            numbers = numbers.narrow(axis, first, stop - first)
        found = numbers.flatten()
        first, last = int(found[0]), int(found[-1])
        return slice(first, last + 1) if last - first + 1 == len(found) else found

    def to(self, device: torch.device) -> "Span":
        """The same tokens, whose :attr:`index` is on a device: used there, it is not copied."""
        if isinstance(self.index, slice) or self.index.device == device:
            return self
        moved = replace(self)
        vars(moved)["index"] = self.index.to(device)
        return moved


class Sequences(NamedTuple):
    """The spans of one attention call: of its queries, one of them generated, and of its keys.

    They need not cover a sequence; tokens outside of every span are not recorded.
    """

    query: tuple[Span, ...]
    key: tuple[Span, ...]

    @property
    def generated(self) -> Span:
        """The generated tokens among the queries.

        Raises:
            ValueError: There is no such span, or there are several.
        """
        found = [span for span in self.query if span.role == GENERATED]
        if len(found) != 1:
            raise ValueError(
                "spans must name one generated span of the queries, got "
                f"{', '.join(span.name for span in found) or 'none'}"
            )
        return found[0]

    def keys_of(self, role: Role) -> tuple[Span, ...]:
        """The spans of the keys that have a role."""
        return tuple(span for span in self.key if span.role == role)


def in_order(*parts: tuple[str, Role, Sequence[int]], start: int = 0) -> tuple[Span, ...]:
    """Spans one after the other; those without tokens are left out.

    Args:
        *parts: ``(name, role, grid)``.
        start: Index of the first token.
    """
    spans = []
    for name, role, grid in parts:
        if math.prod(grid):
            spans.append(Span(name, role, start, tuple(grid)))
            start = spans[-1].stop
    return tuple(spans)


def joint(*parts: tuple[str, Role, Sequence[int]]) -> Sequences:
    """One sequence that is queries and keys at once: :func:`in_order` of both."""
    spans = in_order(*parts)
    return Sequences(spans, spans)
