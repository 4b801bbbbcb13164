"""Which rows of a denoiser call are the conditional samples, and which the unconditional ones."""

from collections.abc import Callable

import torch

from i2am.attribution.accumulator import Accumulator
from i2am.layouts.token_layout import CONDITIONAL, UNCONDITIONAL

Target = tuple[slice, Accumulator]


class Branches:
    """Sends the rows of each denoiser call to the accumulator of their guidance branch.

    Guidance runs as parts of one batch or as separate calls, conditional first, and may be switched
    off during a run, so every call is judged by its own rows against the number of samples. That
    number shows at the scheduler's first step only: until then whole batches are recorded, and
    :meth:`reveal` keeps the rows that were meant. What else a pipeline calls the denoiser for
    (self-attention guidance on blurred latents, say) is nobody's.

    Args:
        make: Makes an accumulator, given ``unresolved=``.
        order: Names of the parts in one batch, all of them; parts that are neither conditional
            nor unconditional are not recorded.
        wanted: Branches to keep.

    Attributes:
        recorded: Accumulators of the wanted branches that were met.
        met: Every branch that was met, wanted or not.
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
        self._separate = True
        self._pending: list[Accumulator] = []
        self.recorded: dict[str, Accumulator] = {}
        self.met: set[str] = set()

    def targets(self, call_index: int, rows: int) -> list[Target]:
        """Accumulators for the rows of the ``call_index``-th denoiser call of this evaluation.

        Raises:
            ValueError: The rows are no multiple of the samples, or their parts are not those of the
                order.
        """
        if self._samples is None:
            while len(self._pending) <= call_index:
                self._pending.append(self._make(unresolved=True))
            return [(slice(0, rows), self._pending[call_index])]
        targets = []
        for branch, part in self._split(call_index, rows, self._samples):
            if branch not in self.recorded:
                self.recorded[branch] = self._make(unresolved=False)
            targets.append((part, self.recorded[branch]))
        return targets

    def reveal(self, samples: int | None) -> None:
        """The scheduler stepped ``samples`` latents (``None``: every row was a sample).

        Raises:
            ValueError: The rows recorded until now are no multiple of them, or their parts are not
                those of the order.
        """
        if self._samples is not None:
            return
        met = [(i, pending) for i, pending in enumerate(self._pending) if pending.samples]
        self._pending = []
        self._samples = samples or (met[0][1].samples if met else None)
        for call_index, accumulator in met:
            parts = self._split(call_index, accumulator.samples or 0, self._samples or 1)
            # sums born in inference mode could not be added to outside of it later
            with torch.inference_mode(False):
                for branch, part in parts:
                    self.recorded[branch] = accumulator.resolve(part)

    def begin(self, group: int) -> None:
        """What comes now belongs to a time group."""
        for accumulator in self.recorded.values():
            accumulator.begin(group)

    def _split(self, call_index: int, rows: int, samples: int) -> list[tuple[str, slice]]:
        """The wanted parts of a call's rows.

        Raises:
            ValueError: The rows are no multiple of the samples, or the parts are not those of the
                order.
        """
        parts, rest = divmod(rows, samples)
        if rest or parts == 0:
            raise ValueError(
                f"the denoiser's batch must be a multiple of the {samples} samples that the "
                f"scheduler steps, got {rows} rows"
            )
        if call_index == 0:
            self._separate = parts == 1
            if parts not in (1, len(self._order)):
                raise ValueError(
                    f"guidance_order of the layout must name the {parts} parts of the denoiser's "
                    f"batch ({rows} rows for {samples} samples), got {self._order}"
                )
            names = [CONDITIONAL] if parts == 1 else [*self._order]
        else:
            names = [UNCONDITIONAL] if (call_index, parts) == (1, 1) and self._separate else []
        self.met.update(names)
        return [
            (name, slice(i * samples, (i + 1) * samples))
            for i, name in enumerate(names)
            if name in self._wanted
        ]
