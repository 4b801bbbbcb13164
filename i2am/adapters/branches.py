"""Which rows of a denoiser call are the conditional samples, and which the unconditional ones."""

from collections.abc import Callable

from i2am.attribution.accumulator import Accumulator
from i2am.layouts.token_layout import CONDITIONAL, UNCONDITIONAL

OTHER = "other"

Target = tuple[slice, Accumulator]


class Branches:
    """Sends the rows of each denoiser call to the accumulator of their guidance branch.

    Guidance runs as parts of one batch or as separate calls, conditional first, and may be switched
    off during a run, so every call is judged by its own rows against the number of samples. That
    number shows at the scheduler's first step only: until then whole batches are recorded, and
    :meth:`reveal` keeps the rows that were meant.

    Args:
        make: Makes an accumulator, given ``unresolved=``.
        order: Order of the parts in one batch.
        wanted: Branches to keep.
    """

    def __init__(
        self,
        make: Callable[..., Accumulator],
        *,
        order: tuple[str, ...],
        wanted: tuple[str, ...],
    ) -> None:
        self._make = make
        self._order = order
        self._wanted = wanted
        self._samples: int | None = None
        self._pending: list[Accumulator] = []
        self.recorded: dict[str, Accumulator] = {}

    def targets(self, call_index: int, rows: int) -> list[Target]:
        """Accumulators for the rows of the ``call_index``-th denoiser call of this evaluation."""
        if self._samples is None:
            while len(self._pending) <= call_index:
                self._pending.append(self._make(unresolved=True))
            return [(slice(0, rows), self._pending[call_index])]
        targets = []
        for branch, part in self._split(call_index, rows):
            if branch in self._wanted:
                if branch not in self.recorded:
                    self.recorded[branch] = self._make(unresolved=False)
                targets.append((part, self.recorded[branch]))
        return targets

    def reveal(self, samples: int | None) -> None:
        """The scheduler stepped ``samples`` latents (``None``: every row was a sample)."""
        if self._samples is not None or not self._pending:
            return
        recorded = [accumulator for accumulator in self._pending if len(accumulator)]
        self._samples = samples or (recorded[0].samples if recorded else None)
        for call_index, accumulator in enumerate(self._pending):
            rows = accumulator.samples
            if rows is None:
                continue
            for branch, part in self._split(call_index, rows):
                if branch in self._wanted and branch not in self.recorded:
                    self.recorded[branch] = accumulator.resolve(part)
        self._pending.clear()

    def _split(self, call_index: int, rows: int) -> list[tuple[str, slice]]:
        samples = self._samples or rows
        parts, rest = divmod(rows, samples)
        if rest or parts == 0:
            raise ValueError(
                f"the denoiser's batch must be a multiple of the {samples} samples that the "
                f"scheduler steps, got {rows} rows"
            )
        if parts == 1:
            names = [(CONDITIONAL, UNCONDITIONAL)[call_index] if call_index < 2 else OTHER]
        else:
            # further parts are perturbed copies (PAG): nobody asked for them
            names = [*self._order[:parts], *[OTHER] * (parts - len(self._order))]
        return [(name, slice(i * samples, (i + 1) * samples)) for i, name in enumerate(names)]
