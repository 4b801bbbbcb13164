"""The optimisation loop that both stages share: schedule, averages, checkpoints, log lines."""

import logging
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from i2am.training.averaging import AveragedWeights
from i2am.training.checkpoint import Checkpoint, last_checkpoint, save_checkpoint
from i2am.training.journal import Journal
from i2am.training.recipe import Optimisation

log = logging.getLogger(__name__)


class Stage(Protocol):
    """What is optimised, and how good it is."""

    name: str
    module: nn.Module
    """Its parameters that require gradients are trained."""
    optimisation: Optimisation

    def loss(
        self, module: nn.Module, step: int, micro: int, rank: int, world: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one backward pass, and plain numbers to log.

        Args:
            module: `module` as it was prepared for the devices.
            step: Optimiser steps made before.
            micro: Number of the backward pass within the step.
            rank: Number of this process.
            world: Number of processes.
        """
        ...

    def validate(self, step: int) -> dict[str, float]:
        """Metrics on held-out scenes; called with the averaged weights in place."""
        ...


@dataclass(frozen=True)
class Intervals:
    """How often what is done besides training; no number here changes the weights.

    Args:
        checkpoint: Steps between checkpoints.
        validate: Steps between validations; 0 leaves them out.
        log: Steps between log lines.
        keep: Checkpoints to keep.
        stop_after: Steps after which the stage is left unfinished, None for none.
    """

    checkpoint: int = 500
    validate: int = 1000
    log: int = 10
    keep: int = 2
    stop_after: int | None = None

    def __post_init__(self) -> None:
        least = {"checkpoint": 1, "validate": 0, "log": 1, "keep": 1, "stop_after": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{name} must be {smallest} or more, got {value}")


def learning_rate(optimisation: Optimisation, step: int) -> float:
    """The learning rate of step number `step`, counted from 0."""
    if step < optimisation.warmup:
        return optimisation.learning_rate * (step + 1) / optimisation.warmup
    decaying = max(1, optimisation.steps - optimisation.warmup)
    done = min(1.0, (step - optimisation.warmup) / decaying)
    share = optimisation.final_rate
    share += (1 - share) * 0.5 * (1 + math.cos(math.pi * done))
    return optimisation.learning_rate * share


def optimise(
    stage: Stage,
    accelerator: Accelerator,
    folder: Path,
    intervals: Intervals,
    *,
    progress: bool = True,
) -> bool:
    """Trains a stage to its last step, from its last whole checkpoint where there is one.

    At the end the averaged weights, where there are any, are in the stage's module.

    Args:
        stage: What to train.
        accelerator: Places the module and reduces gradients.
        folder: Where checkpoints and log.jsonl are kept.
        intervals: What is done how often.
        progress: Whether to show a progress bar.

    Returns:
        False when `intervals.stop_after` came before the last step.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    plan = stage.optimisation
    parameters = {
        name: values for name, values in stage.module.named_parameters() if values.requires_grad
    }
    optimiser = torch.optim.AdamW(
        list(parameters.values()),
        lr=plan.learning_rate,
        betas=plan.betas,
        weight_decay=plan.weight_decay,
        foreach=True,
    )
    module, prepared = accelerator.prepare(stage.module, optimiser)
    average = None if plan.ema is None else AveragedWeights(parameters, plan.ema, plan.steps)
    start = _resume(folder, parameters, prepared, average, accelerator)
    end = min(plan.steps, intervals.stop_after or plan.steps)
    record = Journal(folder / "log.jsonl", start) if accelerator.is_main_process else None

    bar = tqdm(
        total=plan.steps,
        initial=start,
        desc=stage.name,
        unit="step",
        disable=not (progress and accelerator.is_main_process),
        dynamic_ncols=True,
    )
    began = time.monotonic()
    module.train()
    with bar:
        for step in range(start, end):
            for group in prepared.param_groups:
                group["lr"] = learning_rate(plan, step)
            numbers = _step(stage, module, prepared, accelerator, step)
            if average is not None:
                average.update(step)
            done = step + 1
            saving = done % intervals.checkpoint == 0 or done == end
            if saving or done % intervals.log == 0:
                # before it is saved: a checkpoint of NaN would be resumed for ever
                values = _averaged(numbers, accelerator)
                _check_finite(values, stage.name, step)
                bar.set_postfix(loss=f"{values['loss']:.4f}")
                if record is not None:
                    seconds = (time.monotonic() - began) / (done - start)
                    rate = learning_rate(plan, step)
                    record.write({"step": done, **values, "lr": rate, "seconds_per_step": seconds})
            bar.update()
            if saving:
                if accelerator.is_main_process:
                    checkpoint = _checkpoint(done, parameters, prepared, average, accelerator)
                    save_checkpoint(folder, checkpoint, keep=intervals.keep)
                accelerator.wait_for_everyone()
            if intervals.validate and (done % intervals.validate == 0 or done == plan.steps):
                metrics = {}
                if accelerator.is_main_process:
                    metrics = _validate(stage, stage.module, average, done)
                accelerator.wait_for_everyone()
                if record is not None and metrics:
                    record.write({"step": done, **metrics})
                    shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
                    log.info("%s step %d: %s", stage.name, done, shown)
    if end < plan.steps:
        return False
    if average is not None:
        average.keep()
    accelerator.free_memory()
    stage.module.eval()
    return True


def _step(
    stage: Stage, module: nn.Module, optimiser: Any, accelerator: Accelerator, step: int
) -> dict[str, Tensor]:
    plan = stage.optimisation
    rank, world = accelerator.process_index, accelerator.num_processes
    sums: dict[str, Tensor] = {}
    for micro in range(plan.accumulate):
        last = micro == plan.accumulate - 1
        with nullcontext() if last else accelerator.no_sync(module):
            with accelerator.autocast():
                loss, numbers = stage.loss(module, step, micro, rank, world)
            accelerator.backward(loss / plan.accumulate)
        for name, value in {"loss": loss, **numbers}.items():
            part = value.detach() / plan.accumulate
            sums[name] = sums[name] + part if name in sums else part
    parameters = [values for values in module.parameters() if values.requires_grad]
    if plan.clip:
        sums["gradient"] = accelerator.clip_grad_norm_(parameters, plan.clip)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return sums


def _checkpoint(
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimiser: Any,
    average: AveragedWeights | None,
    accelerator: Accelerator,
) -> Checkpoint:
    tensors: dict[str, Mapping[str, Tensor]] = {"model": parameters}
    if average is not None:
        tensors["ema"] = average.averages
    scaler = getattr(accelerator, "scaler", None)
    notes = {} if scaler is None else {"scaler": scaler.state_dict()}
    return Checkpoint(step, tensors, optimiser.state_dict(), notes)


def _resume(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimiser: Any,
    average: AveragedWeights | None,
    accelerator: Accelerator,
) -> int:
    found = last_checkpoint(folder)
    if found is None:
        return 0
    with torch.no_grad():
        for name, values in parameters.items():
            values.copy_(found.tensors["model"][name])
    if average is not None:
        average.load(found.tensors["ema"])
    optimiser.load_state_dict(dict(found.optimiser))
    if getattr(accelerator, "scaler", None) is not None and "scaler" in found.notes:
        accelerator.scaler.load_state_dict(found.notes["scaler"])
    log.info("resuming %s after step %d", folder.name, found.step)
    return found.step


def _validate(
    stage: Stage, module: nn.Module, average: AveragedWeights | None, done: int
) -> dict[str, float]:
    module.eval()
    try:
        with nullcontext() if average is None else average.applied(), torch.no_grad():
            return stage.validate(done)
    finally:
        module.train()


def _averaged(numbers: Mapping[str, Tensor], accelerator: Accelerator) -> dict[str, float]:
    """Plain numbers, each the mean over all processes."""
    values = torch.stack([value.detach().float().reshape(()) for value in numbers.values()])
    reduced = accelerator.reduce(values, reduction="mean")
    return dict(zip(numbers, reduced.tolist(), strict=True))


def _check_finite(values: Mapping[str, float], name: str, step: int) -> None:
    if not math.isfinite(values["loss"]):
        raise FloatingPointError(
            f"the loss of the {name} is {values['loss']} at step {step}; lower --learning-rate"
        )
