"""Where a run is: which evaluation of the denoiser, which denoising step, which time group."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor


class RunClock:
    """Follows a diffusers scheduler: ``set_timesteps`` begins a run, ``step`` ends an evaluation.

    Neither timestep values (PNDM and Heun repeat them) nor calls of the denoiser (two per step with
    guidance in separate calls) identify a step. A scheduler of higher order evaluates the denoiser
    more often than ``num_inference_steps``; evaluation ``i`` of ``n`` belongs to denoising step
    ``i * n_steps // n``, which is exact for PNDM (51 for 50) and second-order solvers (2 n - 1).

    Args:
        scheduler: The scheduler to follow, ``None`` for a denoiser in a loop of the caller's.
        time_groups: Number of groups; step ``s`` of ``n`` is in group ``s * time_groups // n``.
        steps: Number of evaluations where there is no scheduler.
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
        self._saved: dict[str, Any] = {}
        self.steps = self.evaluations = steps or 1
        self.evaluation = 0
        self.timesteps: list[Any] = []

    def bind(self, *, on_run: Callable[[], None], on_step: Callable[[int | None], None]) -> None:
        """Whom to tell: when a run begins, and the number of samples after each evaluation."""
        self._on_run, self._on_step = on_run, on_step

    @property
    def step_index(self) -> int:
        """0-based denoising step of the current evaluation."""
        return min(self.evaluation * self.steps // self.evaluations, self.steps - 1)

    @property
    def group(self) -> int:
        """0-based time group of the current evaluation; 0 is the noisiest."""
        return self.step_index * self.time_groups // self.steps

    def begin(self) -> None:
        """Start counting a run from its first evaluation.

        Raises:
            ValueError: The run has fewer steps than there are time groups.
        """
        self.evaluation = 0
        self.timesteps = []
        if self.scheduler is not None:
            self.evaluations = len(self.scheduler.timesteps)
            announced = getattr(self.scheduler, "num_inference_steps", None)
            self.steps = min(announced or self.evaluations, self.evaluations)
        self._check_groups()
        self._on_run()

    def advance(self, timestep: Any = None, samples: int | None = None) -> None:
        """The current evaluation is over."""
        if self.evaluation == 0 and self.scheduler is not None:
            self._skip_to(timestep)
        self.timesteps.append(timestep)
        self._on_step(samples)
        self.evaluation += 1

    def attach(self) -> None:
        """Wrap the scheduler's methods on the instance; its class and configuration stay as is."""
        if self.scheduler is None:
            return
        scheduler = self.scheduler
        set_timesteps, step = scheduler.set_timesteps, scheduler.step

        # pipelines inspect these signatures to decide what to pass: wraps keeps them
        @functools.wraps(set_timesteps)
        def recording_set_timesteps(*args: Any, **kwargs: Any) -> Any:
            result = set_timesteps(*args, **kwargs)
            self.begin()
            return result

        @functools.wraps(step)
        def recording_step(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            given = dict(zip(("model_output", "timestep", "sample"), args, strict=False)) | kwargs
            sample = given.get("sample")
            self.advance(given.get("timestep"), None if sample is None else len(sample))
            return result

        self._wrap("set_timesteps", recording_set_timesteps)
        self._wrap("step", recording_step)

    def detach(self) -> None:
        """Leave the scheduler as it was found."""
        for name, original in self._saved.items():
            if original is None:
                delattr(self.scheduler, name)
            else:
                setattr(self.scheduler, name, original)
        self._saved.clear()

    def _wrap(self, name: str, wrapper: Callable[..., Any]) -> None:
        # an instance attribute of somebody else's, if any, has to come back
        self._saved[name] = vars(self.scheduler).get(name)
        setattr(self.scheduler, name, wrapper)

    def _skip_to(self, timestep: Any) -> None:
        """Image-to-image starts inside the schedule: count what is left of it."""
        scheduler = self.scheduler
        timesteps = scheduler.timesteps  # type: ignore[union-attr]
        begin = getattr(scheduler, "begin_index", None)
        if begin is None:
            # the schedulers without a begin index find their place by the value, like this
            found = (timesteps == _on_device_of(timesteps, timestep)).nonzero()
            begin = int(found[0]) if len(found) else 0
        announced = len(timesteps)
        self.evaluations = max(announced - int(begin), 1)
        self.steps = max(round(self.steps * self.evaluations / announced), 1)
        self._check_groups()

    def _check_groups(self) -> None:
        if self.steps < self.time_groups:
            raise ValueError(
                f"time_groups must be at most the number of denoising steps, "
                f"got {self.time_groups} for {self.steps}"
            )


def _on_device_of(timesteps: Tensor, timestep: Any) -> Any:
    return timestep.to(timesteps.device) if isinstance(timestep, Tensor) else timestep
