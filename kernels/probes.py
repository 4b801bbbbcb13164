"""Probes: which sums of a softmax are wanted, ``W softmax(S) V^T``, and where they are added."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor

from i2am.kernels.arguments import check_sums, statistics_dtype
from i2am.kernels.pooling import Pooling

Side = Tensor | Pooling | None
"""Weights ``[batch or 1, rows, tokens]``, a pooling of the tokens, or the identity."""


class Over(StrEnum):
    """Which axis a softmax of the scores sums to 1 over."""

    KEYS = "keys"
    """``P``: what the model multiplies with its values; every query spends 1."""
    QUERIES = "queries"
    """``C``: every key spends 1; the model never computes it."""


@dataclass(frozen=True, eq=False)
class Probe:
    """``into += W softmax(S) V^T``.

    ===========  ======  =======  ======================================================
    over         left    right    into
    ===========  ======  =======  ======================================================
    ``keys``     tensor           ``W P``: ``[batch, heads, rows, seqlen_k]``
    ``queries``          tensor   ``C V^T``: ``[batch, heads, groups, seqlen_q]``
    ``keys``             tensor   ``P V^T``: ``[batch, heads, groups, seqlen_q]``
    either       cells   cells    ``[batch, heads, cells of queries, cells of keys]``, or
                                  without the axis of heads for the mean over them
    ===========  ======  =======  ======================================================

    Attributes:
        over: Which softmax.
        into: The accumulator, fp32 (fp64 with fp64 inputs), any strides; no two elements may share
            memory.
        left: ``W``: ``[batch or 1, rows, seqlen_q]``, a pooling of the queries, or ``None`` for a
            row per query.
        right: ``V``: ``[batch or 1, groups, seqlen_k]``, any real numbers, a pooling of the keys,
            or ``None`` for a column per key.
    """

    over: Over | str
    into: Tensor
    left: Side = None
    right: Side = None


@dataclass
class Pooled:
    """The probes that read the same cells of both sides, and so the same tiles."""

    left: Pooling | None
    right: Pooling | None
    over_keys: list[Tensor] = field(default_factory=list)
    over_queries: list[Tensor] = field(default_factory=list)


@dataclass
class Sorted:
    """Probes by what an implementation has to do for them."""

    rows: list[tuple[Tensor, Tensor]]
    """Of every ``W P``: ``W [batch, rows, seqlen_q]`` and the accumulator."""
    votes: list[tuple[Tensor, Tensor]]
    """Of every ``C V^T``: ``V [batch, groups, seqlen_k]`` and the accumulator."""
    values: list[tuple[Tensor, Tensor]]
    """Of every ``P V^T``, likewise."""
    pooled: list[Pooled]


def sort(probes: Iterable[Probe]) -> Sorted:
    """Sorts checked probes; those that have nothing to add are left out."""
    found = Sorted([], [], [], [])
    pooled: dict[tuple[int, int], Pooled] = {}
    for probe in probes:
        left, right = probe.left, probe.right
        if isinstance(left, Tensor):
            if left.shape[1]:
                found.rows.append((left, probe.into))
        elif isinstance(right, Tensor):
            if right.shape[1]:
                kind = found.values if probe.over == Over.KEYS else found.votes
                kind.append((right, probe.into))
        else:
            same = pooled.setdefault((id(left), id(right)), Pooled(left, right))
            (same.over_keys if probe.over == Over.KEYS else same.over_queries).append(probe.into)
    found.pooled = list(pooled.values())
    return found


def as_weights(name: str, weights: Tensor, query: Tensor, tokens: int, what: str) -> Tensor:
    """Weights of the tokens of one side as ``[batch, rows, tokens]`` in the statistics' dtype.

    Raises:
        ValueError: The shape does not fit.
    """
    batch = len(query)
    if weights.ndim != 3 or weights.shape[0] not in (1, batch) or weights.shape[2] != tokens:
        raise ValueError(
            f"{name} must be [{batch} or 1, {what}, {tokens}], got {tuple(weights.shape)}"
        )
    return weights.to(query.device, statistics_dtype(query)).expand(batch, -1, -1)


def checked(probes: Sequence[Probe], query: Tensor, key: Tensor) -> list[Probe]:
    """The probes with weights in the dtype of the statistics, and all on the device of ``query``.

    Raises:
        ValueError: A probe is of no supported kind, or a tensor of it does not fit.
    """
    batch, heads, seqlen_q, _ = query.shape
    sides: dict[tuple[int, int], Side] = {}

    def side(name: str, given: Side, tokens: int, what: str) -> Side:
        # probes of one pooling share their tiles, which is known by its identity
        if (id(given), tokens) not in sides:
            if isinstance(given, Tensor):
                sides[id(given), tokens] = as_weights(name, given, query, tokens, what)
            else:
                if given is not None and given.size != tokens:
                    raise ValueError(
                        f"{name} must pool {tokens} tokens, got a pooling of {given.size}"
                    )
                sides[id(given), tokens] = None if given is None else given.to(query.device)
        return sides[id(given), tokens]

    def length(given: Side, tokens: int) -> int:
        if isinstance(given, Tensor):
            return given.shape[1]
        return tokens if given is None else given.cells

    result = []
    for number, probe in enumerate(probes):
        name = f"probes[{number}]"
        try:
            over = Over(probe.over)
        except ValueError:
            raise ValueError(
                f"{name}.over must be 'keys' or 'queries', got {probe.over!r}"
            ) from None
        weighted = [isinstance(given, Tensor) for given in (probe.left, probe.right)]
        pooled = [isinstance(given, Pooling) for given in (probe.left, probe.right)]
        if any(weighted) and (all(weighted) or any(pooled)):
            raise ValueError(
                f"{name} must have a tensor on one side and nothing on the other, or poolings, got "
                f"{_what(probe.left)} on the left and {_what(probe.right)} on the right"
            )
        if weighted[0] and over == Over.QUERIES:
            raise ValueError(
                f"{name} must be over 'keys' where left is a tensor, got 'queries': W C is not "
                "supported"
            )
        left = side(f"{name}.left", probe.left, seqlen_q, "rows")
        right = side(f"{name}.right", probe.right, key.shape[2], "groups")
        shape = (length(left, seqlen_q), length(right, key.shape[2]))
        if weighted[1]:
            shape = shape[::-1]
        mean = probe.into.ndim == 3 and not any(weighted)
        check_sums(f"{name}.into", probe.into, (batch, *([] if mean else [heads]), *shape), query)
        result.append(Probe(over, probe.into, left, right))
    return result


def packed(probes: Sequence[Probe]) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Checked probes as an operator takes them: accumulators, sides, and what belongs together."""
    numbers: dict[int, int] = {id(None): -1}
    tensors: list[Tensor] = []
    counts: list[int] = []
    parts: list[int] = []
    for probe in probes:
        for side in (probe.left, probe.right):
            if side is not None and id(side) not in numbers:
                own = [side] if isinstance(side, Tensor) else side.tensors()
                numbers[id(side)] = len(counts)
                counts.append(len(own))
                tensors += own
        over_keys = probe.over == Over.KEYS
        parts += [int(over_keys), numbers[id(probe.left)], numbers[id(probe.right)]]
    return [probe.into for probe in probes], tensors, [*counts, *parts]


def unpacked(sums: Sequence[Tensor], tensors: Sequence[Tensor], plan: Sequence[int]) -> list[Probe]:
    """The inverse of :func:`packed`."""
    counts = plan[: len(plan) - 3 * len(sums)]
    sides: list[Side] = []
    first = 0
    for count in counts:
        own = tensors[first : first + count]
        sides.append(own[0] if count == 1 else Pooling.from_tensors(own))
        first += count
    sides.append(None)  # number -1
    probes = []
    for number, into in enumerate(sums):
        over_keys, left, right = plan[len(counts) + 3 * number :][:3]
        probes.append(
            Probe(Over.KEYS if over_keys else Over.QUERIES, into, sides[left], sides[right])
        )
    return probes


def _what(side: Side) -> str:
    if side is None:
        return "nothing"
    return "a pooling" if isinstance(side, Pooling) else "a tensor"
