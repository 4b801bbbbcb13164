"""Where a run is: which evaluation of the denoiser, which denoising step, which time group."""

import functools
import inspect
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

from i2am.adapters.guard import UNGUARDED
from i2am.adapters.hooks import replace_method


class RunClock:
    """Follows a scheduler: ``set_timesteps`` announces a run, ``step`` ends an evaluation.

    A run begins with the first denoiser call after the announcement. Neither timestep values (PNDM
    and Heun repeat them) nor calls of the denoiser (two per evaluation with guidance in separate
    calls) identify a step, and a step may take several evaluations: see :meth:`_step_of`.

    Groups are counted as the run goes. Timesteps tell at its end which of them is the noisiest, and
    whether its steps were those of one pass over the schedule: see :meth:`check` and :attr:`rises`.

    Args:
        scheduler: The scheduler to follow, ``None`` for a denoiser in a loop of the caller's.
        time_groups: Number of groups asked for, see `groups`.
        steps: Without a scheduler: evaluations of one run, ``None`` if unknown.

    Attributes:
        evaluations: How many evaluations the run was announced to have, ``None`` if unknown.
        evaluation: How many are over.
        steps: Denoising steps of the run.
        timesteps: The scheduler's values, one per evaluation that is over.
        idle: How many of these neither called the denoiser nor replayed a CUDA graph of it.
        captured: Set once attention of this run was recorded into a CUDA graph, whose replays
            call nobody.
    """

    def __init__(
        self,
        scheduler: Any | None,
        *,
        time_groups: int,
        steps: int | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.time_groups = time_groups
        self.bind(on_run=lambda: None, on_step=lambda samples: None)
        self._undo: list[Callable[[], None]] = []
        self._announced = True
        self._called = False
        self._stale = False
        self.captured = False
        self.evaluations: int | None = None
        self.evaluation = 0
        self.idle = 0
        self.timesteps: list[Any] = []
        self.steps = 1
        self._schedule: Sequence[Any] = ()
        if scheduler is None and steps is not None:
            self._expect(steps)

    def bind(
        self,
        *,
        on_run: Callable[[], None],
        on_step: Callable[[int | None], None],
        guard: AbstractContextManager[Any] = UNGUARDED,
        here: Callable[[], bool] = lambda: True,
    ) -> None:
        """Whom to tell: when a run begins, and the number of samples after each evaluation; both,
        where the scheduler is the caller, inside ``guard``, and only of calls that are ``here``."""
        self._on_run, self._on_step, self._guard, self._here = on_run, on_step, guard, here

    @property
    def groups(self) -> int:
        """Time groups of the run: as many as were asked for, but none without a step."""
        return min(self.time_groups, self.steps)

    @property
    def group(self) -> int:
        """0-based time group of the current evaluation, in the order of the run."""
        step = min(self._step_of(self.evaluation), self.steps - 1)
        return step * self.groups // self.steps

    @property
    def over(self) -> bool:
        """Whether a scheduler has made all steps that it announced."""
        if self.scheduler is None or self.evaluations is None or self._announced:
            return False
        return self.evaluation >= self.evaluations

    @property
    def rises(self) -> bool:
        """Whether noise grows along the run, as in an inversion, so that its last group is the
        noisiest."""
        made = self._made()
        if not made or made[0] == made[-1]:
            return False
        config = getattr(self.scheduler, "config", None)
        # timesteps that count what is clean
        return (made[-1] > made[0]) != bool(getattr(config, "invert_sigmas", False))

    def check(self) -> None:
        """Refuse a run whose groups are not in order of noise, or whose steps are of several.

        Raises:
            RuntimeError: Timesteps went up and down, or the scheduler made one of them more often
                than its schedule has it.
        """
        made = self._made()
        if self.scheduler is None or not made:
            return
        starts = [i for i in range(len(made)) if i == 0 or self._step_of(i) > self._step_of(i - 1)]
        first = [made[i] for i in starts]
        if first not in (sorted(first), sorted(first, reverse=True)):
            raise RuntimeError(
                "time groups need timesteps that only fall, or only rise, got a run of "
                f"{', '.join(f'{timestep:g}' for timestep in first)}"
            )
        schedule = Counter(float(timestep) for timestep in self._schedule)
        for timestep, times in Counter(made).items():
            if times > schedule.get(timestep, times):
                raise RuntimeError(
                    f"a scheduler must make the steps of one image, got {times} evaluations at "
                    f"timestep {timestep:g}, which its schedule has {schedule[timestep]} times "
                    "(windows, or several images by one scheduler?)"
                )

    def arrive(self) -> None:
        """The denoiser is about to be called."""
        self._called = True
        over = self.scheduler is None and self.evaluation == self.evaluations
        if not self._announced and not over:
            return
        self._announced = False
        self._stale |= self.captured
        self.captured = False
        self._on_run()
        self.evaluation = 0
        self.idle = 0
        self.timesteps = []
        if self.scheduler is not None:
            self._schedule = self.scheduler.timesteps
            self._expect(len(self._schedule))

    def advance(self, timestep: Any = None, samples: int | None = None) -> None:
        """The current evaluation is over.

        Raises:
            RuntimeError: It was replayed by a CUDA graph of another run, or comes after the last
                one that was announced.
        """
        stale = self.captured if self._announced else self._stale and not self.captured
        if stale and not self._called:
            raise RuntimeError(
                "a recorded run must begin with calls of the denoiser itself and capture a CUDA "
                "graph of its own, got a step after a replay of an earlier one"
            )
        called, self._called = self._called, False
        if self._announced:
            return  # somebody else's step: the denoiser was not called since the run was announced
        if not called and not self.captured and self._again(timestep):
            return  # another step of the evaluation before
        if called and self.over:
            raise RuntimeError(
                f"a recorded run must have at most the {self.evaluations} evaluations that "
                "set_timesteps announced, got one more; call set_timesteps before every run"
            )
        self.idle += not called and not self.captured
        self.timesteps.append(timestep)
        # repeated timesteps may hide the place of the first one until the second
        if self.scheduler is not None and self.evaluation < 2:
            self._expect(len(self.scheduler.timesteps) - self._first_evaluation())
        self.evaluation += 1
        if self.evaluations is None:
            self.steps = self.evaluation
        self._on_step(samples)

    def attach(self) -> None:
        """Wrap the scheduler's methods on the instance; its class and configuration stay as is."""
        self._announced = True
        if self.scheduler is None:
            return
        set_timesteps, step = self.scheduler.set_timesteps, self.scheduler.step
        signature = inspect.signature(step)

        def recording_set_timesteps(*args: Any, **kwargs: Any) -> Any:
            result = set_timesteps(*args, **kwargs)
            self._announced |= self._here()
            return result

        def recording_step(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            if self._here():
                with self._guard:
                    given = signature.bind_partial(*args, **kwargs).arguments
                    sample = given.get("sample")
                    self.advance(given.get("timestep"), None if sample is None else len(sample))
            return result

        for name, plain, recording in (
            ("set_timesteps", set_timesteps, recording_set_timesteps),
            ("step", step, recording_step),
        ):
            ours = _Wrapper(self.scheduler, plain, recording)
            self._undo.append(replace_method(self.scheduler, name, ours))

    def detach(self) -> None:
        """Leave the scheduler as it was found."""
        for put_back in self._undo:
            put_back()
        self._undo.clear()

    def _expect(self, evaluations: int) -> None:
        self.evaluations = max(evaluations, 1)
        self.steps = self._step_of(self.evaluations - 1) + 1

    def _step_of(self, evaluation: int) -> int:
        """0-based denoising step of an evaluation, both counted from where the run begins."""
        runge_kutta = getattr(self.scheduler, "prk_timesteps", None)
        if runge_kutta is None:
            # second-order solvers evaluate twice per step, only the last step once
            return evaluation // getattr(self.scheduler, "order", 1)
        # PNDM: four evaluations for each Runge-Kutta step; without these, two for the first step
        if len(runge_kutta) == 0:
            return max(evaluation - 1, 0)
        return min(evaluation, len(runge_kutta)) // 4 + max(evaluation - len(runge_kutta), 0)

    def _first_evaluation(self) -> int:
        """Where in the schedule the run began: image-to-image skips the noisiest part."""
        index = getattr(self.scheduler, "step_index", None)
        if index is not None:  # already moved on by the step just made
            return int(index) - len(self.timesteps)
        schedule = [float(timestep) for timestep in self.scheduler.timesteps]  # type: ignore[union-attr]
        seen = [float(timestep) for timestep in self.timesteps]
        starts = range(len(schedule) - len(seen) + 1)
        return next((i for i in starts if schedule[i : i + len(seen)] == seen), 0)

    def _again(self, timestep: Any) -> bool:
        """Whether a step without a call is at the timestep of the one before."""
        if not self.timesteps or timestep is None or self.timesteps[-1] is None:
            return False
        return float(timestep) == float(self.timesteps[-1])

    def _made(self) -> list[float]:
        """Timesteps of the evaluations that are over, where all are known."""
        if any(timestep is None for timestep in self.timesteps):
            return []
        made = [float(timestep) for timestep in self.timesteps]
        return made if all(map(math.isfinite, made)) else []


class _Wrapper:
    """A scheduler's method on the instance, which a copy of the scheduler does not keep."""

    def __init__(self, scheduler: Any, original: Any, call: Callable[..., Any]) -> None:
        # pipelines inspect these signatures to decide what to pass
        functools.update_wrapper(self, original)
        self._scheduler = scheduler
        self._original = original
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._scheduler))
        if copied is None:
            return self  # without the scheduler, as in a copy of its attributes
        if getattr(self._original, "__self__", None) is not self._scheduler:
            return self._original
        return MethodType(self._original.__func__, copied)
