"""The recorder: listens to the layers of a denoiser and to its scheduler, and has the maps."""

import contextlib
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from i2am.adapters.attention.attending import Attend, attend_beside
from i2am.adapters.attention.sites import NUMBERS
from i2am.adapters.attention.tap import Tap, inside
from i2am.adapters.branches import Branches
from i2am.adapters.clock import RunClock
from i2am.adapters.contexts import Calls
from i2am.adapters.guard import Guard
from i2am.adapters.hooks import weakly
from i2am.adapters.report import Report
from i2am.adapters.run import BEFORE, Run
from i2am.adapters.subject import Subject
from i2am.attribution.maps import AttributionMaps


class Recorder:
    """What ``record()`` returns: records between ``attach`` and ``detach``, or in a ``with``.

    It takes the calls of the context (:mod:`contextvars`) that entered the block, which tasks and
    ``asyncio.to_thread`` inside inherit; not those of other threads and tasks, not even of a plain
    thread that is started inside, unless it runs in ``contextvars.copy_context()``. After
    :meth:`attach` without a block it takes all calls of its thread too.

    Nothing that goes wrong in the recording disturbs the run: it ends the recording, with a warning
    at once and the error in :meth:`maps`, and the run goes on without recording. A recorder that
    nobody refers to any more is detached: what it leaves in the model refers to it weakly.

    Args:
        denoisers: The modules whose calls are the evaluations: one, or the halves of a schedule,
            whose layers have the same paths.
        subject: What is recorded of them.
        clock: Follows the scheduler.
        attend: How recorded layers attend.
    """

    def __init__(
        self,
        denoisers: Sequence[nn.Module],
        subject: Subject,
        *,
        clock: RunClock,
        attend: Attend = attend_beside,
    ) -> None:
        self.layout = subject.layout
        self._denoisers = tuple(denoisers)
        self._networks = tuple(map(inside, denoisers))
        self._subject = subject
        self._calls = Calls(next(NUMBERS))
        self._clock = clock
        self._guard = Guard(weakly(self._give_up))
        clock.bind(
            on_run=weakly(self._begin_run),
            on_step=weakly(self._end_evaluation),
            guard=self._guard,
            here=self._calls.here,
        )
        self._attend = attend
        self._in_block = False
        self._attachment: weakref.finalize[..., Any] | None = None
        self._tap: Tap | None = None
        self._processors: dict[str, str] = {}
        self._lost: dict[str, str] = {}
        self._elsewhere = self._unread = 0
        self._run = Run(self._subject, clock, self._processors)

    def __enter__(self) -> Self:
        self._attach(in_block=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Start recording, until :meth:`detach`.

        A recorder of the same denoiser that was attached by this method in this thread, as by an
        earlier run of a notebook's cell, is detached first, with a warning; it keeps what it has
        recorded.

        Raises:
            RuntimeError: The denoiser is being recorded in a ``with`` block or in another thread.
        """
        self._attach(in_block=False)

    def _attach(self, *, in_block: bool) -> None:
        with _LOCK:  # two threads may come at once
            self._take_over()
            restore: list[Callable[[], None]] = []
            undo = (self._networks, self._clock, restore)
            # runs at detach(), or when the last reference to the recorder goes
            self._attachment = weakref.finalize(self, _detach, *undo)
            self._attachment.atexit = False
            for network in self._networks:
                _ATTACHED[network] = weakref.ref(self)
        self._in_block = in_block
        self._elsewhere = self._unread = 0
        self._run.read = True  # of an earlier block
        self._calls.take(thread=not in_block)
        guarded = self._guard.around
        try:
            tap = self._tap = Tap(
                self._denoisers,
                layers=set(self._subject.layers).__contains__,
                listen=guarded(weakly(self._add)),
                before=guarded(weakly(self._open)),
                after=guarded(weakly(self._close)),
                attend=self._attend,
                guard=self._guard,
                here=self._calls.here,
                values=self._subject.norms is not None,
            )
            for layer in tap.layers:
                self._processors[layer.path] = type(layer.module.processor).__name__
            restore.append(tap.detach)
            tap.attach()
            restore.append(self._subject.pictures.attach())
            if self._subject.words is not None:
                restore.append(self._subject.words.attach())
            restore += map(self._calls.name_by_cache_context, self._networks)
            self._clock.attach()
        except BaseException:
            self.detach()
            raise

    def _take_over(self) -> None:
        name = self._subject.denoiser
        for earlier in filter(None, map(attached_to, self._networks)):
            if earlier._in_block or not earlier._calls.of_this_thread:
                first = "leave that record() block" if earlier._in_block else "detach that recorder"
                raise RuntimeError(
                    f"{name} is being recorded already; {first} first, or drop that recording by "
                    "i2am.release(pipe)"
                )
            earlier.detach()
            warnings.warn(
                f"{name} was still being recorded by an earlier recorder, which is detached now; "
                "call detach() when a recording is over",
                stacklevel=4,
            )

    def detach(self) -> None:
        """Put processors, hooks and scheduler back as they were; does nothing the second time."""
        attachment = self._attachment
        if attachment is None or not attachment.alive:
            return
        self._in_block = False
        self._lost = self._find_lost()
        attachment()
        self._calls.leave()

    def calls(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Say which guidance part the denoiser calls of a block are, in a loop of one's own.

        Args:
            name: ``"conditional"``, ``"unconditional"`` or another part of the guidance order, one
                row per sample; any other name (``"refinement"``) is for calls that are no part:
                they are not recorded, and counted under it in ``provenance["other_calls"]``.

        Example:
            >>> with recorder.calls("unconditional"):  # doctest: +SKIP
            ...     without = unet(latents, t, encoder_hidden_states=nothing).sample
            >>> with recorder.calls("conditional"):  # doctest: +SKIP
            ...     given = unet(latents, t, encoder_hidden_states=garment).sample

        Raises:
            ValueError: The name is empty.
        """
        if not name:
            raise ValueError(f"name must say what the calls are, got {name!r}")
        return self._calls.mark(name)

    def maps(self, branch: str | None = None) -> AttributionMaps:
        """The maps of the last run.

        Args:
            branch: ``"conditional"`` or ``"unconditional"``; needed only if both were recorded.

        Returns:
            A copy of the sums: recording may go on.

        Raises:
            ValueError: ``branch`` is not one that ``record()`` was asked for.
            RuntimeError: Nothing was recorded, or not in that branch; says what was seen instead.
            Exception: What ended the recording of this run, of its own type: ``ValueError`` where
                the layout or the masks do not fit the run, ``NotImplementedError`` where it holds
                what cannot be recorded, ``RuntimeError`` where its steps are not those of one image
                in order of noise, or the fault of a ``resolve`` or of ours.
        """
        run, clock, wanted = self._run, self._clock, self._subject.wanted
        branch = branch or wanted[0]
        if branch not in wanted:
            raise ValueError(
                f"branch must be one that record() was asked for, {' or '.join(wanted)}, "
                f"got {branch!r}"
            )
        if run.failure is not None:
            # without the frames of earlier calls, which would hold their tensors
            raise run.failure.with_traceback(None)
        lost = self._find_lost() if self._attached else self._lost
        accumulator = run.branches.recorded.get(branch)
        if accumulator is None or not len(accumulator):
            met = run.branches.met
            raise RuntimeError(
                run.seen.nothing(branch, met=met, lost=lost, elsewhere=self._elsewhere)
            )
        clock.check()
        report = Report(
            run,
            branch,
            accumulator,
            over=not self._attached,
            lost=lost,
            attach="beside" if self._attend is attend_beside else "fused",
            elsewhere=self._elsewhere,
            unread=self._unread,
        )
        for remark in report.remarks():
            warnings.warn(remark, stacklevel=2)
        self._unread, run.read = 0, True
        return AttributionMaps(
            report.sums,
            votes=accumulator.votes,
            rows=accumulator.rows,
            provenance=report.provenance(),
            pairs=report.pairs,
        )

    @property
    def _attached(self) -> bool:
        return self._attachment is not None and self._attachment.alive

    def _begin_run(self) -> None:
        earlier, made = self._run, self._clock.evaluation
        others: Counter[str] = Counter()
        if earlier.seen.denoiser_calls and not made:
            others[BEFORE] = earlier.seen.denoiser_calls + earlier.others[BEFORE]
        self._unread += bool(made and not earlier.read)
        self._run = Run(self._subject, self._clock, self._processors, others)
        self._subject.begin_run()

    def _give_up(self, error: Exception) -> None:
        """The run goes on without recording: nothing of it stays attached, or in memory."""
        if not self._attached:
            return
        call = self._run.seen.denoiser_calls
        # whatever else fails on the way out, the first error is the one to tell
        with contextlib.suppress(Exception):
            self.detach()
        self._run = Run(self._subject, self._clock, self._processors, failure=error)
        error.add_note(f"recording ended at call {call} of the denoiser, the run went on without")
        # the user may have made errors of warnings
        with contextlib.suppress(Warning):
            warnings.warn(
                f"recording ended at call {call} of the denoiser, the run goes on without: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )

    def _end_evaluation(self, samples: int | None) -> None:
        self._run.end_evaluation(samples)

    def _open(self, network: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._calls.here():
            self._elsewhere += 1
            return
        self._run.refuse_second()
        self._clock.arrive()
        self._run.open(network, args, kwargs, self._calls.name)

    def _close(self, network: int) -> None:
        if not self._calls.here():
            return
        self._run.close()
        if self._clock.scheduler is None:
            self._clock.advance()

    def _add(self, layer: int, call_index: int, query: Tensor, *rest: Any) -> None:
        if query.is_cuda and torch.cuda.is_current_stream_capturing():
            self._clock.captured = True
            # a graph knows addresses and keeps nothing: replayed too late, until there is another,
            # it must not write into what somebody else was given meanwhile
            for network in self._networks:
                _CAPTURED[network] = self._run.branches
        self._run.add(layer, call_index, query, *rest)

    def _find_lost(self) -> dict[str, str]:
        lost = {} if self._tap is None else self._tap.lost()
        return {layer.path: type(processor).__name__ for layer, processor in lost.items()}


def attached_to(denoiser: nn.Module) -> Recorder | None:
    """The recorder of a denoiser, ``None`` if it is not being recorded."""
    reference = _ATTACHED.get(inside(denoiser))
    return None if reference is None else reference()


def _detach(
    networks: Sequence[nn.Module], clock: RunClock, restore: list[Callable[[], None]]
) -> None:
    """Put everything back; knows no recorder, because its own may be gone."""
    clock.detach()
    for put_back in restore:
        put_back()
    restore.clear()
    for network in networks:
        _ATTACHED.pop(network, None)


_LOCK = threading.Lock()
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Recorder]] = weakref.WeakKeyDictionary()
_CAPTURED: weakref.WeakKeyDictionary[nn.Module, Branches] = weakref.WeakKeyDictionary()
