"""The recorder: listens to the layers of a denoiser and to its scheduler, and has the maps."""

import contextlib
import itertools
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from i2am.adapters.attending import Attend, attend_beside
from i2am.adapters.branches import Branches, Target
from i2am.adapters.clock import RunClock
from i2am.adapters.guard import Guard
from i2am.adapters.hooks import around_calls, weakly
from i2am.adapters.inputs import versions
from i2am.adapters.observations import Observations
from i2am.adapters.pictures import Pictures
from i2am.adapters.sites import LISTENERS, Site
from i2am.attribution.accumulator import Accumulator
from i2am.attribution.direction import Direction
from i2am.attribution.grid import Grid, describe_regions
from i2am.attribution.layers import apply
from i2am.attribution.maps import AttributionMaps
from i2am.attribution.sums import AttentionSite, LayerSums
from i2am.attribution.time_groups import too_many
from i2am.layouts.token_layout import AttentionCall, Frame, TokenLayout, Tokens


class Recorder:
    """What ``record()`` returns: records between ``attach`` and ``detach``, or in a ``with``.

    Nothing that goes wrong in the recording disturbs the run: it ends the recording, with a warning
    at once and the error in :meth:`maps`, and the run goes on without recording. A recorder that
    nobody refers to any more is detached: what it leaves in the model refers to it weakly.

    Args:
        denoiser: The module whose calls are the evaluations.
        layout: Which of its attention layers and tokens.
        clock: Follows the scheduler.
        wanted: Guidance branches to keep, the first one being :meth:`maps`'s default.
        make: Makes an accumulator, given ``unresolved=``.
        pictures: Lays the masks that `make` uses over the pictures of each run.
        attend: How recorded layers attend.

    Raises:
        ValueError: No attention layer matches the layout, or one that the layout does not describe.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        *,
        layout: TokenLayout,
        clock: RunClock,
        wanted: tuple[str, ...],
        make: Callable[..., Accumulator],
        pictures: Pictures,
        attend: Attend = attend_beside,
    ) -> None:
        self.layout = layout
        self._denoiser = denoiser
        # torch.compile wraps the module; its layers are inside, its calls come from outside
        self._network = getattr(denoiser, "_orig_mod", denoiser)
        attention = {
            name: module
            for name, module in self._network.named_modules()
            if hasattr(module, "get_processor")
        }
        self._layers = {name: m for name, m in attention.items() if layout.matches(name)}
        if not self._layers:
            raise ValueError(
                f"layout {layout.name!r} must match an attention layer of "
                f"{type(self._network).__name__}, but {layout.layers!r} matches none of "
                f"{len(attention)}: {', '.join([*attention][:4])}, ..."
            )
        if layout.context_keys:
            for name, module in self._layers.items():
                if not getattr(module, "is_cross_attention", False):
                    raise ValueError(
                        f"layout {layout.name!r} must match cross-attention layers alone, whose "
                        f"keys are a context, got the {type(module).__name__} {name} of "
                        f"{type(self._network).__name__}, whose keys are also the image's own"
                    )
        self._names = list(self._layers)
        config = getattr(self._network, "config", None)
        self._rounds_up = getattr(config, "downsample_padding", 1) != 0
        self._clock = clock
        self._guard = Guard(weakly(self._give_up))
        clock.bind(
            on_run=weakly(self._begin_run), on_step=weakly(self._end_evaluation), guard=self._guard
        )
        self._wanted = wanted
        self._make = make
        self._pictures = pictures
        self._attend = attend
        self._in_block = False
        self._attachment: weakref.finalize[..., Any] | None = None
        self._installed: dict[str, Any] = {}
        self._processors: dict[str, str] = {}
        self._lost: dict[str, str] = {}
        self._key = next(_KEYS)
        self._forget_run()

    def __enter__(self) -> Self:
        self.attach()
        self._in_block = True
        return self

    def __exit__(self, *exception: object) -> None:
        self._in_block = False
        self.detach()

    def attach(self) -> None:
        """Start recording, until :meth:`detach`.

        A recorder of the same denoiser that was attached by this method, as by an earlier run of a
        notebook's cell, is detached first, with a warning; it keeps what it has recorded.

        Raises:
            RuntimeError: The denoiser is being recorded in a ``with`` block.
        """
        from i2am.adapters.processors import install

        reference = _ATTACHED.get(self._network)
        earlier = None if reference is None else reference()
        if earlier is not None:
            network = type(self._network).__name__
            if earlier._in_block:
                raise RuntimeError(
                    f"{network} is being recorded already; leave that record() block first"
                )
            earlier.detach()
            warnings.warn(
                f"{network} was still being recorded by an earlier recorder, which is detached "
                "now; call detach() when a recording is over",
                stacklevel=2,
            )
        restore: list[Callable[[], None]] = []
        undo = (self._key, self._network, self._clock, restore)
        # runs at detach(), or when the last reference to the recorder goes
        self._attachment = weakref.finalize(self, _detach, *undo)
        self._attachment.atexit = False
        _ATTACHED[self._network] = weakref.ref(self)
        guarded = self._guard.around
        LISTENERS[self._key] = guarded(weakly(self._add))
        try:
            for index, (name, module) in enumerate(self._layers.items()):
                self._processors[name] = type(module.processor).__name__
                site = Site(self._key, index)
                restore.append(install(module, site, self._attend, self._guard))
                self._installed[name] = module.processor
            before, after = weakly(self._open_frame), weakly(self._close_frame)
            restore.append(self._pictures.attach())
            restore.append(around_calls(self._denoiser, guarded(before), guarded(after)))
            self._clock.attach()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Put processors, hooks and scheduler back as they were; does nothing the second time."""
        attachment = self._attachment
        if attachment is None or not attachment.alive:
            return
        self._lost = self._find_lost()
        attachment()
        self._installed.clear()

    def maps(self, guidance: str | None = None) -> AttributionMaps:
        """The maps of the last run.

        Args:
            guidance: ``"conditional"`` or ``"unconditional"``; needed only if both were recorded.

        Returns:
            A copy of the sums: recording may go on.

        Raises:
            ValueError: ``guidance`` is not a branch that ``record()`` was asked for.
            RuntimeError: Nothing was recorded, or not in that branch; says what was seen instead.
            Exception: What ended the recording of this run, of its own type: ``ValueError`` where
                the layout or the masks do not fit the run, ``NotImplementedError`` where it holds
                what cannot be recorded, or the fault of a ``resolve`` or of ours.
        """
        branch = guidance or self._wanted[0]
        if branch not in self._wanted:
            raise ValueError(
                f"guidance must be one that record() was asked for, {' or '.join(self._wanted)}, "
                f"got {branch!r}"
            )
        if self._failure is not None:
            # without the frames of earlier calls, which would hold their tensors
            raise self._failure.with_traceback(None)
        lost = self._find_lost() if self._attached else self._lost
        accumulator = self._branches.recorded.get(branch)
        if accumulator is None or not len(accumulator):
            raise RuntimeError(self._seen.nothing(branch, met=self._branches.met, lost=lost))
        sums, joint = accumulator.layers(), accumulator.joint()
        no_joint = joint is None and accumulator.records_joint
        for remark in self._remarks(sums, lost, no_joint=no_joint):
            warnings.warn(remark, stacklevel=2)
        groups = self._clock.groups
        return AttributionMaps(
            apply(lambda held: held[:, :groups].clone(), sums),
            votes=accumulator.votes,
            rows=accumulator.rows,
            provenance=self._provenance(branch, accumulator),
            joint=joint and joint.first_groups(groups),
        )

    @property
    def _attached(self) -> bool:
        return self._attachment is not None and self._attachment.alive

    def _begin_run(self) -> None:
        self._forget_run()
        self._pictures.begin_run()

    def _forget_run(self) -> None:
        self._branches = Branches(self._make, order=self.layout.guidance_order, wanted=self._wanted)
        self._seen = Observations(self.layout, self._processors)
        self._failure: Exception | None = None
        self._call = 0
        self._frame: Frame | None = None
        self._rows = 0
        self._targets: list[Target] = []
        self._resolved: dict[tuple[AttentionCall, Grid | None], tuple[Tokens, Tokens] | None] = {}
        # whether any call had keys beside the reference tokens
        self._beside_reference = False
        self._said: set[str] = set()

    def _give_up(self, error: Exception) -> None:
        """The run goes on without recording: nothing of it stays attached, or in memory."""
        if not self._attached:
            return
        call = self._seen.denoiser_calls
        # whatever else fails on the way out, the first error is the one to tell
        with contextlib.suppress(Exception):
            self.detach()
        self._forget_run()
        self._failure = error
        error.add_note(f"recording ended at call {call} of the denoiser, the run went on without")
        # the user may have made errors of warnings
        with contextlib.suppress(Warning):
            warnings.warn(
                f"recording ended at call {call} of the denoiser, the run goes on without: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )

    def _end_evaluation(self, samples: int | None) -> None:
        self._branches.reveal(samples)
        # here, outside of any graph that is being captured or replayed
        self._branches.begin(self._clock.group)
        self._call = 0

    def _open_frame(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._clock.arrive()
        self._seen.denoiser_calls += 1
        sample: Any = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        if not isinstance(sample, Tensor):
            raise NotImplementedError(
                f"recording {type(self._network).__name__} is not supported: the input of a "
                f"denoiser must be a tensor of all samples, got {type(sample).__name__}"
            )
        size = (sample.shape[2], sample.shape[3]) if sample.ndim == 4 else None
        self._frame = Frame(size, kwargs, rounds_up=self._rounds_up)
        self._rows = len(sample)
        self._targets = self._branches.targets(self._call, self._rows)

    def _close_frame(self) -> None:
        self._frame = None
        self._targets = []
        self._call += 1
        if self._clock.scheduler is None:
            self._clock.advance()

    def _add(
        self,
        layer: int,
        call_index: int,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        scale: float | None,
        query_lse: Tensor | None,
    ) -> None:
        if self._frame is None:
            return  # gradient checkpointing runs layers again outside of the denoiser's forward
        if query.is_cuda and torch.cuda.is_current_stream_capturing():
            self._clock.captured = True
            # a graph knows addresses and keeps nothing: replayed too late, until there is another,
            # it must not write into what somebody else was given meanwhile
            _CAPTURED[self._network] = self._branches
        name = self._names[layer]
        call = AttentionCall(name, call_index, query.shape[2], key.shape[2])
        size = self._frame.size
        if (call, size) not in self._resolved:
            found = self.layout.resolve(call, self._frame)
            if found is not None:
                self._pictures.meet(*found, size)
                found = found[0].to(query.device), found[1]
            self._resolved[call, size] = found
        tokens = self._resolved[call, size]
        if tokens is None:
            return
        if len(query) != self._rows:
            raise NotImplementedError(
                f"recording attention over {len(query)} rows in a denoiser call of {self._rows} is "
                f"not supported ({name}; do video frames lie in the batch?)"
            )
        generated, reference = tokens
        if generated.size is None:
            raise ValueError(f"layout {self.layout.name!r} must give the generated tokens a grid")
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
                    group=self._clock.group,
                    reference=reference.index,
                    voters=slice(None) if self.layout.prefix_votes else None,
                    scale=scale,
                    bias=_part_of_bias(bias, rows, generated.index),
                    query_lse=None if query_lse is None else query_lse[rows, :, generated.index],
                )
        self._seen.calls[name] += 1
        self._beside_reference |= reference.count < key.shape[2]

    def _provenance(self, branch: str, accumulator: Accumulator) -> dict[str, Any]:
        clock = self._clock
        return {
            "denoiser": type(self._network).__name__,
            "scheduler": None if clock.scheduler is None else type(clock.scheduler).__name__,
            "layout": self.layout.name,
            "note": self.layout.note or None,
            "prefix_votes": self.layout.prefix_votes if self._beside_reference else None,
            "guidance_order": list(self.layout.guidance_order),
            "guidance": branch,
            "attach": "beside" if self._attend is attend_beside else "fused",
            "pictures": self._pictures.provenance(),
            "regions": describe_regions(accumulator.regions),
            "steps": clock.steps,
            "evaluations": clock.evaluation,
            "timesteps": [float(t) for t in clock.timesteps if t is not None],
            "calls": dict(self._seen.calls),
            "versions": versions(),
        }

    def _find_lost(self) -> dict[str, str]:
        return {
            name: type(self._layers[name].processor).__name__
            for name, installed in self._installed.items()
            if self._layers[name].processor is not installed
        }

    def _remarks(self, sums: list[LayerSums], lost: dict[str, str], *, no_joint: bool) -> list[str]:
        """What was not said yet about this run."""
        over = not self._attached
        remarks = self._seen.remarks(sums, lost=lost, over=over)
        if no_joint:
            remarks.append(
                "joint maps were asked for and there are none: they need reference tokens with a "
                "place on the reference image, which no recorded layer has"
            )
        if (more := too_many(self._clock.time_groups, self._clock.steps)) is not None:
            remarks.append(more)
        announced, made = self._clock.evaluations, self._clock.evaluation
        if over and announced is not None and made != announced:
            remarks.append(
                f"the run made {made} of {announced} announced evaluations: "
                "its time groups are not equally long"
            )
        if self._clock.idle:
            remarks.append(
                f"the denoiser was not called in {self._clock.idle} of {made} evaluations (does "
                "another one take its place?): they are missing in its maps"
            )
        remarks = [remark for remark in remarks if remark not in self._said]
        self._said.update(remarks)
        return remarks


def _detach(
    key: int, network: nn.Module, clock: RunClock, restore: list[Callable[[], None]]
) -> None:
    """Put everything back; knows no recorder, because its own may be gone."""
    LISTENERS.pop(key, None)
    clock.detach()
    for put_back in restore:
        put_back()
    restore.clear()
    _ATTACHED.pop(network, None)


_G2R = (Direction.GENERATED_TO_REFERENCE,)
_KEYS = itertools.count()
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Recorder]] = weakref.WeakKeyDictionary()
_CAPTURED: weakref.WeakKeyDictionary[nn.Module, Branches] = weakref.WeakKeyDictionary()


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
