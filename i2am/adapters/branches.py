"""Which rows of a denoiser call are the conditional samples, and which the unconditional ones."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from i2am.adapters.guidance import GuidanceOrder
from i2am.attribution.accumulator import Accumulator
from i2am.layouts.token_layout import CONDITIONAL, UNCONDITIONAL

Target = tuple[slice, Accumulator]

EXTRA = "extra"
"""Calls in an evaluation that are no guidance part, as :attr:`Branches.others` counts them."""

_MARK = "mark the calls with recorder.calls(...)"


@dataclass
class _Call:
    rows: int
    name: str | None
    moment: Tensor | float | None


class Branches:
    """Sends the rows of each denoiser call to the accumulator of their guidance branch.

    A call has its branch from its name, where it has one, and else from the order of the parts.
    Guidance runs as parts of one batch or as separate calls, and may be switched off during a run,
    so every call is judged by its own rows against the number of samples. That number shows at the
    scheduler's first step only: until then whole batches are recorded, and :meth:`end` keeps the
    rows that were meant. What else a pipeline calls the denoiser for (self-attention guidance on
    blurred latents, say) is nobody's.

    Args:
        make: Makes an accumulator, given ``unresolved=``.
        order: Names of the parts in one batch, all of them, and of separate calls; parts that are
            neither conditional nor unconditional are not recorded.
        wanted: Branches to keep.

    Attributes:
        recorded: Accumulators of the wanted branches that were met.
        met: Every branch that was met, wanted or not.
        others: How many calls were no guidance part, by what they were called.
    """

    def __init__(
        self,
        make: Callable[..., Accumulator],
        *,
        order: GuidanceOrder,
        wanted: tuple[str, ...],
    ) -> None:
        self._make = make
        self._order = order
        self._wanted = wanted
        self._samples: int | None = None
        # of the first evaluation, whose samples are not known yet
        self._pending: list[tuple[_Call, Accumulator]] = []
        # whether names tell the guidance parts, and whether the order does: not both in one run
        self._named = self._ordered = False
        # whether parts are calls of their own
        self._apart = False
        self._begin_evaluation()
        self.recorded: dict[str, Accumulator] = {}
        self.met: set[str] = set()
        self.others: Counter[str] = Counter()

    def _begin_evaluation(self) -> None:
        self._names: list[str] = []  # of the calls that each are one part, by order
        self._marked: set[str] = set()  # of those that have a name
        self._batch = False
        self._moment: Tensor | float | None = None

    def targets(
        self, rows: int, name: str | None = None, moment: Tensor | float | None = None
    ) -> list[Target]:
        """Accumulators for the rows of the next denoiser call of this evaluation.

        Args:
            rows: Its batch.
            name: What it is called, if anything.
            moment: The timestep that it was given, if known.

        Raises:
            ValueError: The rows are no multiple of the samples, or nothing tells which part of the
                guidance they are.
        """
        call = _Call(rows, name, moment)
        if self._samples is None:
            self._pending.append((call, self._make(unresolved=True)))
            return [(slice(0, rows), self._pending[-1][1])]
        targets = []
        for branch, part in self._split(call, self._samples):
            if branch not in self.recorded:
                self.recorded[branch] = self._make(unresolved=False)
            targets.append((part, self.recorded[branch]))
        return targets

    def end(self, samples: int | None) -> list[Target]:
        """The evaluation is over: the scheduler stepped ``samples`` latents (``None``: every row
        was a sample).

        Returns:
            After the first evaluation, the rows of its calls that turned out to be wanted samples,
            and the unresolved accumulator that was given them; else nothing.

        Raises:
            ValueError: The rows recorded until now are no multiple of them, or nothing tells which
                part of the guidance they are.
        """
        revealed = self._reveal(samples) if self._samples is None else []
        calls = self._order.calls
        if self._names and calls is not None:
            number = len(self._names)
            first = CONDITIONAL if number == 1 else calls[0]
            if self._names[0] != first or 1 < number < len(calls):
                raise ValueError(
                    f"guidance_order of the layout must name the {number} calls that the denoiser "
                    f"got in one evaluation, got {calls}; where their number changes, {_MARK}"
                )
        self._begin_evaluation()
        return revealed

    def begin(self, group: int) -> None:
        """What comes now belongs to a time group."""
        for accumulator in self.recorded.values():
            accumulator.begin(group)

    def _reveal(self, samples: int | None) -> list[Target]:
        met, self._pending = self._pending, []
        self._samples = samples or (met[0][0].rows if met else None)
        # a prefill is at another moment than the evaluation that follows it
        unnamed = [call for call, _ in met if call.name is None]
        beside = [call for call in unnamed if not _same(call.moment, unnamed[-1].moment)]
        for call in beside:
            call.name = EXTRA
        alone = [call for call in unnamed if call.name is None and call.rows == self._samples]
        self._apart = len(alone) > 1
        # who has a name is known before the rest is told by its order
        self._named = any(call.name in self._parts for call, _ in met)
        revealed: list[Target] = []
        for call, pending in met:
            parts = self._split(call, self._samples or call.rows)
            if not pending.samples:
                continue  # none of its attention was recorded
            # sums born in inference mode could not be added to outside of it later
            with torch.inference_mode(False):
                for branch, part in parts:
                    self.recorded[branch] = pending.resolve(part)
                    revealed.append((part, pending))
        return revealed

    @property
    def order(self) -> tuple[str, ...]:
        """The order of the parts, of calls where they are calls of their own."""
        return self._order.calls if self._apart and self._order.calls else self._order.batch

    @property
    def _parts(self) -> set[str]:
        return {CONDITIONAL, UNCONDITIONAL, *self._order.batch, *(self._order.calls or ())}

    def _split(self, call: _Call, samples: int) -> list[tuple[str, slice]]:
        """The wanted parts of a call's rows."""
        names = self._names_of(call, samples)
        if names:
            self.met.update(names)
        else:
            self.others[call.name or EXTRA] += 1
        return [
            (name, slice(i * samples, (i + 1) * samples))
            for i, name in enumerate(names)
            if name in self._wanted
        ]

    def _names_of(self, call: _Call, samples: int) -> list[str]:
        if call.name is not None and call.name not in self._parts:
            return []
        parts, rest = divmod(call.rows, samples)
        if rest or parts == 0:
            raise ValueError(
                f"the denoiser's batch must be a multiple of the {samples} samples that the "
                f"scheduler steps, got {call.rows} rows"
            )
        if call.name is not None:
            return self._by_name(call.name, parts)
        if self._named:
            return []
        self._ordered = True
        return self._by_batch(call.rows, parts, samples) if parts > 1 else self._by_call(call)

    def _by_name(self, name: str, parts: int) -> list[str]:
        if parts > 1:
            raise ValueError(
                f"a call named {name!r} must have one row per sample, got {parts} per sample"
            )
        if self._ordered:
            raise ValueError(
                f"calls must have names from the first evaluation on or not at all, got {name!r} "
                f"after calls without; {_MARK} of every evaluation"
            )
        if name in self._marked:
            raise ValueError(
                f"an evaluation must have one call named {name!r}, got several (windows of one "
                "image?)"
            )
        self._named = True
        self._marked.add(name)
        return [name]

    def _by_batch(self, rows: int, parts: int, samples: int) -> list[str]:
        order = self._order.batch
        if parts != len(order):
            raise ValueError(
                f"guidance_order of the layout must name the {parts} parts of the denoiser's "
                f"batch ({rows} rows for {samples} samples), got {order}"
            )
        if self._batch or self._names:
            raise ValueError(
                f"an evaluation must have one batch of guidance parts, and that first, got another "
                f"of {rows} rows after a call before it (windows of one image?); {_MARK}"
            )
        self._batch = True
        return [*order]

    def _by_call(self, call: _Call) -> list[str]:
        if self._batch:
            return []
        number, calls = len(self._names), self._order.calls
        if number == 0:
            self._moment = call.moment
            name = calls[0] if self._apart and calls is not None else CONDITIONAL
            self._names.append(name)
            return [name]
        if not _same(self._moment, call.moment):
            raise ValueError(
                "the calls of one evaluation must be at one timestep, got another after the first; "
                + _MARK
            )
        if calls is None:
            raise ValueError(
                "guidance_order of the layout must name the calls of an evaluation in their order, "
                "such as ('unconditional', 'conditional'), got several calls and no order; or "
                + _MARK
            )
        if number >= len(calls):
            return []
        if self._names[0] != calls[0]:
            raise ValueError(
                f"guidance_order {calls} of the layout must hold from the first evaluation on, got "
                f"a second call after evaluations of one; {_MARK}"
            )
        self._names.append(calls[number])
        return [calls[number]]


def _same(one: Tensor | float | None, other: Tensor | float | None) -> bool:
    if one is None or other is None:
        return True
    return _first(one) == _first(other)


def _first(moment: Tensor | float) -> float:
    return float(moment.flatten()[0]) if isinstance(moment, Tensor) else float(moment)
