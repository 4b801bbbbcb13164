"""One run of a denoiser: whose rows its calls are, and what its layers attend to."""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from i2am.adapters.branches import Branches, Target
from i2am.adapters.clock import RunClock
from i2am.adapters.multipliers import Multipliers
from i2am.adapters.observations import Observations
from i2am.adapters.sources import Rows, Sources, part_of_bias
from i2am.adapters.subject import Subject
from i2am.attribution.accumulator import Accumulator
from i2am.attribution.direction import Direction
from i2am.attribution.grid import Grid
from i2am.layouts.token_layout import AttentionCall, Frame

BEFORE, AFTER, ELSEWHERE = "before the run", "after the run", "other threads or tasks"
"""Calls that are nobody's, as :attr:`Run.others` counts them."""

# how denoisers call their input, and the one that tells the time
_SAMPLES = ("sample", "hidden_states", "x")
_MOMENTS = ("timestep", "timesteps", "t")

_G2R = (Direction.GENERATED_TO_REFERENCE,)


@dataclass
class Run:
    """What a run has left until now, and the denoiser call that is open."""

    subject: Subject
    clock: RunClock
    processors: Mapping[str, str]
    """Class of the attention processor of each layer, by layer."""
    others: Counter[str] = field(default_factory=Counter)
    """Calls of the denoiser that are no guidance part, by what they are; more are counted by
    :attr:`branches`."""
    failure: Exception | None = None
    read: bool = False
    """Whether its maps were asked for."""
    said: set[str] = field(default_factory=set)
    """Remarks that were made."""

    def __post_init__(self) -> None:
        subject = self.subject
        self.branches = Branches(subject.make, order=subject.order, wanted=subject.wanted)
        self.seen = Observations(subject.layout, self.processors)
        self.multipliers = Multipliers()
        self._frame: Frame | None = None
        self._rows = 0
        self._targets: list[Target] = []
        self._memory: dict[Any, Any] = {}
        self.sources = Sources(subject.layout, subject.pictures, subject.words)

    @property
    def other_calls(self) -> dict[str, int]:
        """How many calls of the denoiser were no guidance part, by what they are."""
        return {**(self.others + self.branches.others)}

    def refuse_second(self) -> None:
        """Refuse a call while another one is open.

        Raises:
            NotImplementedError: There is one, in another thread.
        """
        if self._frame is not None:
            raise NotImplementedError(
                f"recording two calls of {self.subject.denoiser} at once is not supported: enter a "
                "record() block in each thread or task, one after the other"
            )

    def open(
        self, network: int, args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None
    ) -> None:
        """A denoiser is called; ``name`` is what the call is called, if anything.

        Raises:
            NotImplementedError: Its input is neither a tensor nor a list.
            ValueError: As :meth:`Branches.targets` does.
        """
        if self.clock.over:
            self.others[AFTER] += 1
            return
        self.seen.denoiser_calls += 1
        called = self.subject.networks[network]
        arguments = called.arguments(args, kwargs)
        sample = args[0] if args else next((arguments[n] for n in _SAMPLES if n in arguments), None)
        if not isinstance(sample, Tensor | list | tuple):
            raise NotImplementedError(
                f"recording {called.name} is not supported: the input of a denoiser must be a "
                f"tensor or a list of all samples, got {type(sample).__name__}"
            )
        self._rows = len(sample)
        self._targets = self.branches.targets(self._rows, name, _moment(arguments))
        self._frame = called.frame(arguments, sample, self._memory)
        self.sources.open(self._frame, self._rows)

    def close(self) -> None:
        """The call is over."""
        self._frame = None
        self._targets = []

    def end_evaluation(self, samples: int | None) -> None:
        """The scheduler has stepped ``samples`` latents, ``None`` if unknown."""
        self.sources.reveal(self.branches.end(samples))
        # here, outside of any graph that is being captured or replayed
        self.branches.begin(self.clock.group)

    def add(
        self,
        layer: int,
        call_index: int,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        scale: float | None,
        query_lse: Tensor | None,
        multiplier: Tensor | None,
        value: Tensor | None,
    ) -> None:
        """A layer attends; see :data:`i2am.adapters.attention.sites.Listener`.

        Raises:
            NotImplementedError: The layer has other rows than the call, or its output projection is
                none of its heads.
            ValueError: The layout does not fit, or the sums cannot hold what they are given.
        """
        if self._frame is None:
            return  # gradient checkpointing runs layers again outside of the denoiser's forward
        name = self.subject.layers[layer]
        call = AttentionCall(name, call_index, query.shape[2], key.shape[2])
        found = self.sources.of(call, query.shape[1], query.device)
        if not found:
            return
        if len(query) != self._rows:
            raise NotImplementedError(
                f"recording attention over {len(query)} rows in a denoiser call of {self._rows} is "
                f"not supported ({name}; do video frames lie in the batch?)"
            )
        norms = self.subject.norms
        for part, accumulator in self._targets:
            for each in found:
                rows = slice(max(each.rows.start, part.start), min(each.rows.stop, part.stop))
                if rows.start >= rows.stop:
                    continue
                self.sources.check(each, part, accumulator)
                # statistics are fp32 also where the model runs under autocast
                with torch.autocast(query.device.type, enabled=False):
                    self._accumulate(
                        accumulator,
                        each,
                        query[rows, :, each.generated],
                        key[rows],
                        scale=scale,
                        bias=part_of_bias(bias, rows, each.generated),
                        lse=None if query_lse is None else query_lse[rows, :, each.generated],
                        norms=None
                        if norms is None or value is None
                        else norms.of(layer, call_index, value[rows]),
                        rows=slice(rows.start - part.start, rows.stop - part.start),
                        samples=part.stop - part.start,
                    )
        if self._targets:
            for each in found:
                for source in each.sources:
                    self.multipliers.add(
                        source.site,
                        None if multiplier is None else multiplier[..., each.generated],
                        group=self.clock.group,
                        together=self._targets[0][1].sums == "resized",
                    )
        self.seen.calls[name] += 1

    def _accumulate(
        self,
        accumulator: Accumulator,
        tokens: Rows,
        query: Tensor,
        key: Tensor,
        *,
        lse: Tensor | None,
        **options: Any,
    ) -> None:
        """Add some rows of a call, source by source; the first finds the row log-sum-exp."""
        for source in tokens.sources:
            site, words = source.site, source.words
            if words is None and site.reference_grid is None and accumulator.directions == _G2R:
                raise ValueError(
                    f"directions must include reference_to_generated for {site.layer}: its "
                    f"{site.reference_tokens} reference tokens have no place on the reference image"
                )
            lse = accumulator.add(
                site,
                query,
                key,
                group=self.clock.group,
                reference=source.keys,
                voters=slice(None) if self.subject.layout.prefix_votes and words is None else None,
                words=words,
                query_lse=lse,
                **options,
            )

    def check_grids(self, recorded: Collection[Grid]) -> None:
        """Refuse maps that lack the finest level of those that were asked for.

        Raises:
            RuntimeError: None of its layers was recorded, because their queries are not the cells
                of its grid.
        """
        finest = max(map(math.prod, recorded))
        for layer, (queries, grid) in self.sources.misfits.items():
            if math.prod(grid) > finest:
                raise RuntimeError(
                    f"attention must have the {grid[0]}x{grid[1]} queries of its level's grid, got "
                    f"{queries} in {layer} and no other layer so fine (merged tokens, tiles or "
                    "windows?); leave such layers out by layers= of the layout"
                )


def _moment(arguments: Mapping[str, Any]) -> Tensor | float | None:
    """The timestep that a denoiser call is given, as it is now."""
    given = next((arguments[name] for name in _MOMENTS if name in arguments), None)
    if isinstance(given, Tensor):
        if given.numel() == 0 or (given.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        return given.detach().flatten()[0].clone()
    return float(given) if isinstance(given, int | float) else None
