"""One run of a denoiser: whose rows its calls are, and what its layers attend to."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from i2am.adapters.branches import Branches, Target
from i2am.adapters.clock import RunClock
from i2am.adapters.guidance import GuidanceOrder
from i2am.adapters.multipliers import Multipliers
from i2am.adapters.observations import Observations
from i2am.adapters.pictures import Pictures
from i2am.attribution.accumulator import Accumulator
from i2am.attribution.direction import Direction
from i2am.attribution.grid import Grid
from i2am.attribution.sums import AttentionSite
from i2am.layouts.token_layout import AttentionCall, Frame, TokenLayout, Tokens

BEFORE, AFTER, ELSEWHERE = "before the run", "after the run", "other threads or tasks"
"""Calls that are nobody's, as :attr:`Run.others` counts them."""

# how denoisers call the input of theirs that tells the time
_MOMENTS = ("timestep", "timesteps", "t")

_G2R = (Direction.GENERATED_TO_REFERENCE,)


@dataclass(frozen=True)
class Subject:
    """What is recorded, the same in every run.

    Args:
        denoiser: Class name of the denoiser.
        layers: Paths of the recorded layers; calls refer to them by their index.
        layout: Which tokens.
        order: Which guidance part is which.
        wanted: Guidance branches to keep.
        make: Makes an accumulator, given ``unresolved=``.
        pictures: Lays the masks that `make` uses over the pictures of each run.
        rounds_up: See :class:`Frame`.
        levels: See :class:`Frame`.
    """

    denoiser: str
    layers: tuple[str, ...]
    layout: TokenLayout
    order: GuidanceOrder
    wanted: tuple[str, ...]
    make: Callable[..., Accumulator]
    pictures: Pictures
    rounds_up: bool
    levels: int | None


def recorded_layers(network: nn.Module, layout: TokenLayout) -> dict[str, Any]:
    """The attention modules of a denoiser that a layout matches, by path.

    Raises:
        ValueError: There is none, or one that the layout does not describe.
    """
    attention = {
        name: module for name, module in network.named_modules() if hasattr(module, "get_processor")
    }
    layers = {name: module for name, module in attention.items() if layout.matches(name)}
    if not layers:
        raise ValueError(
            f"layout {layout.name!r} must match an attention layer of "
            f"{type(network).__name__}, but {layout.layers!r} matches none of "
            f"{len(attention)}: {', '.join([*attention][:4])}, ..."
        )
    if layout.context_keys:
        for name, module in layers.items():
            if not getattr(module, "is_cross_attention", False):
                raise ValueError(
                    f"layout {layout.name!r} must match cross-attention layers alone, whose "
                    f"keys are a context, got the {type(module).__name__} {name} of "
                    f"{type(network).__name__}, whose keys are also the image's own"
                )
    return layers


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
    beside_reference: bool = False
    """Whether any call had keys beside the reference tokens."""
    misfits: dict[str, tuple[int, Grid]] = field(default_factory=dict)
    """Layers whose queries are not the cells of their level's grid: how many, and that grid."""
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
        self._resolved: dict[tuple[AttentionCall, Grid | None], tuple[Tokens, Tokens] | None] = {}

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

    def open(self, args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None) -> None:
        """The denoiser is called; ``name`` is what the call is called, if anything.

        Raises:
            NotImplementedError: The input is no tensor.
            ValueError: As :meth:`Branches.targets` does.
        """
        if self.clock.over:
            self.others[AFTER] += 1
            return
        self.seen.denoiser_calls += 1
        sample: Any = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        if not isinstance(sample, Tensor):
            raise NotImplementedError(
                f"recording {self.subject.denoiser} is not supported: the input of a "
                f"denoiser must be a tensor of all samples, got {type(sample).__name__}"
            )
        size = (sample.shape[2], sample.shape[3]) if sample.ndim == 4 else None
        self._rows = len(sample)
        self._targets = self.branches.targets(self._rows, name, _moment(args, kwargs))
        self._frame = Frame(
            size, kwargs, rounds_up=self.subject.rounds_up, levels=self.subject.levels
        )

    def close(self) -> None:
        """The call is over."""
        self._frame = None
        self._targets = []

    def end_evaluation(self, samples: int | None) -> None:
        """The scheduler has stepped ``samples`` latents, ``None`` if unknown."""
        self.branches.end(samples)
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
    ) -> None:
        """A layer attends; see :data:`i2am.adapters.sites.Listener`.

        Raises:
            NotImplementedError: The layer has other rows than the call.
            ValueError: The layout does not fit, or the sums cannot hold what they are given.
        """
        if self._frame is None:
            return  # gradient checkpointing runs layers again outside of the denoiser's forward
        layout, name = self.subject.layout, self.subject.layers[layer]
        call = AttentionCall(name, call_index, query.shape[2], key.shape[2])
        tokens = self._resolve(call, self._frame, query.device)
        if tokens is None:
            return
        if len(query) != self._rows:
            raise NotImplementedError(
                f"recording attention over {len(query)} rows in a denoiser call of {self._rows} is "
                f"not supported ({name}; do video frames lie in the batch?)"
            )
        generated, reference = tokens
        if generated.size is None:
            raise ValueError(f"layout {layout.name!r} must give the generated tokens a grid")
        site = AttentionSite(
            name,
            heads=query.shape[1],
            generated_grid=generated.size,
            reference_grid=reference.size,
            reference_tokens=reference.count,
            causal=key.shape[2] > 1,
        )
        for rows, accumulator in self._targets:
            if reference.size is None and accumulator.directions == _G2R:
                raise ValueError(
                    f"directions must include reference_to_generated for {name}: its "
                    f"{reference.count} reference tokens have no place on the reference image"
                )
            # statistics are fp32 also where the model runs under autocast
            with torch.autocast(query.device.type, enabled=False):
                accumulator.add(
                    site,
                    query[rows, :, generated.index],
                    key[rows],
                    group=self.clock.group,
                    reference=reference.index,
                    voters=slice(None) if layout.prefix_votes else None,
                    scale=scale,
                    bias=_part_of_bias(bias, rows, generated.index),
                    query_lse=None if query_lse is None else query_lse[rows, :, generated.index],
                )
        if self._targets:
            self.multipliers.add(
                site,
                None if multiplier is None else multiplier[..., generated.index],
                group=self.clock.group,
                together=self._targets[0][1].sums == "resized",
            )
        self.seen.calls[name] += 1
        self.beside_reference |= reference.count < key.shape[2]

    def _resolve(
        self, call: AttentionCall, frame: Frame, device: torch.device
    ) -> tuple[Tokens, Tokens] | None:
        if (call, frame.size) not in self._resolved:
            found = self.subject.layout.resolve(call, frame)
            own = frame.own_grid(call.layer)
            if found is not None:
                self.subject.pictures.meet(*found, frame.size)
                found = found[0].to(device), found[1]
            elif own is not None and own[0] * own[1] != call.seqlen_q:
                self.misfits[call.layer] = call.seqlen_q, own
            self._resolved[call, frame.size] = found
        return self._resolved[call, frame.size]

    def check_grids(self, recorded: Collection[Grid]) -> None:
        """Refuse maps that lack the finest level of those that were asked for.

        Raises:
            RuntimeError: None of its layers was recorded, because their queries are not the cells
                of its grid.
        """
        finest = max(map(math.prod, recorded))
        for layer, (queries, grid) in self.misfits.items():
            if math.prod(grid) > finest:
                raise RuntimeError(
                    f"attention must have the {grid[0]}x{grid[1]} queries of its level's grid, got "
                    f"{queries} in {layer} and no other layer so fine (merged tokens, tiles or "
                    "windows?); leave such layers out by layers= of the layout"
                )


def _moment(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | float | None:
    """The timestep that a denoiser call is given, as it is now."""
    given = args[1] if len(args) > 1 else next((kwargs[n] for n in _MOMENTS if n in kwargs), None)
    if isinstance(given, Tensor):
        if given.numel() == 0 or (given.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        return given.detach().flatten()[0].clone()
    return float(given) if isinstance(given, int | float) else None


# diffusers masks by adding -10000; nothing less than this passes a softmax over keys
_MASKED = -1000.0


def _part_of_bias(bias: Tensor | None, rows: slice, queries: slice | Tensor) -> Tensor | None:
    if bias is None:
        return None
    if bias.ndim == 4 and bias.shape[0] > 1:
        bias = bias[rows]
    if bias.shape[-2] > 1:
        bias = bias[..., queries, :]
    if bias.dtype == torch.bool:
        return bias
    # a constant cancels in the softmax over queries: only -inf keeps hidden tokens from voting
    masked = bias <= _MASKED
    return bias.masked_fill(masked & ~masked.all(-1, keepdim=True), -torch.inf)
