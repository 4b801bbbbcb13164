"""``i2am train``: trains the custom model, at any size, and can be stopped at any moment."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from i2am.cli import flags
from i2am.cli.errors import ExitCode, InputRejected, Stopped, Terminated
from i2am.cli.output import echo
from i2am.cli.types import AT_ONCE, FILE, NAME, NumberType, count

log = logging.getLogger("i2am")

DATA = "paper-doll"
POCKET = "pocket"


@click.command(short_help="Train the custom model; stopped at any moment, it resumes.")
@click.option(
    "--model",
    type=NAME,
    default=POCKET,
    show_default=True,
    help="pocket, trained from nothing, or a folder of a custom model in diffusers layout.",
)
@click.option(
    "--data",
    type=NAME,
    default=DATA,
    show_default=True,
    help="paper-doll, or a folder in VITON-HD layout.",
)
@click.option("-o", "--out", type=FILE, required=True, help="Folder of the run.")
@click.option("--scenes", type=count(), help="Training scenes; all of a folder.")
@click.option("--steps", type=count(), help="Optimiser steps of the denoiser.")
@click.option("--batch", type=count(), help="Scenes per process and backward pass.")
@click.option("--accumulate", type=count(), help="Backward passes per step.")
@click.option(
    "--autoencoder-steps",
    type=count(),
    help="Optimiser steps of the autoencoder, for a model trained from nothing.",
)
@click.option("--learning-rate", type=NumberType(0, 1, min_open=True), help="Its peak.")
@click.option("--dropout", type=NumberType(0, 1), help="How often no garment is shown.")
@click.option("--trainable", type=click.Choice(["all", "paper", "lite"]), help="What learns.")
@click.option(
    "--attention-tv",
    type=NumberType(0),
    help="Weight of the total variation of attention centres.",
)
@click.option("--ema/--no-ema", default=None, help="Average the weights.")
@click.option("--mixed-precision", "precision", type=click.Choice(["no", "bf16", "fp16"]))
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Of weights, order and noise.")
@click.option("--checkpoint-every", type=count(), default=500, show_default=True)
@click.option("--validate-every", type=count(0), default=1000, show_default=True)
@click.option("--keep", type=count(), default=2, show_default=True, help="Checkpoints.")
@click.option("--max-steps", type=count(), help="Stop a stage after so many, to resume.")
@click.option("--workers", type=count(0, AT_ONCE), default=2, show_default=True, help="Readers.")
@click.option(
    "--threads", type=count(most=AT_ONCE), help="Of torch on the CPU; they decide last bits."
)
@flags.quiet
@flags.verbose
@click.pass_context
def train(
    ctx: click.Context,
    model: str,
    data: str,
    out: Path,
    autoencoder_steps: int | None,
    ema: bool | None,
    checkpoint_every: int,
    validate_every: int,
    keep: int,
    max_steps: int | None,
    workers: int,
    threads: int | None,
    quiet: bool,
    verbose: bool,
    **changes: Any,
) -> int | None:
    """Train the custom model on drawn scenes or on a VITON-HD folder.

    What is not given comes from the recipe of the pocket model, or for a folder from that of the
    paper; the output folder's recipe.json has every number. The same command in the same folder
    goes on from the last whole checkpoint. At the end the folder holds pipeline/, which every
    other command takes as MODEL. Several processes: ``accelerate launch -m i2am train ...``.

    Exit codes: 0 done, 1 unexpected, 2 usage, 3 stopped by --max-steps, 4 input rejected, 5 output
    folder in use, 74 disk fault, 130 interrupted, 143 terminated.
    """
    if verbose:
        log.setLevel(logging.DEBUG)
    log.info("preparing to train %s on %s", model, data)
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise InputRejected(
            'training uses accelerate: install it with pip install "i2am[train]"'
        ) from None
    import torch

    from i2am.training.loop import Intervals
    from i2am.training.recipe import PAPER_RECIPE, POCKET_RECIPE, with_changes
    from i2am.training.run import train as run

    if quiet:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        recipe = POCKET_RECIPE if model == POCKET else replace(PAPER_RECIPE, model=model)
        if data != DATA and changes["scenes"] is None:
            recipe = replace(recipe, data=data, scenes=None)
        recipe = with_changes(replace(recipe, data=data), **changes)
        if ema is not None:
            averaged = POCKET_RECIPE.denoiser.optimisation.ema if ema else None
            plan = replace(recipe.denoiser.optimisation, ema=averaged)
            recipe = replace(recipe, denoiser=replace(recipe.denoiser, optimisation=plan))
        if autoencoder_steps is not None:
            if recipe.autoencoder is None:
                raise ValueError(f"--autoencoder-steps is for the pocket model, got {model}")
            plan = replace(recipe.autoencoder.optimisation, steps=autoencoder_steps)
            recipe = replace(recipe, autoencoder=replace(recipe.autoencoder, optimisation=plan))
        intervals = Intervals(
            checkpoint=checkpoint_every, validate=validate_every, keep=keep, stop_after=max_steps
        )
    except ValueError as error:
        raise click.UsageError(f"{error}.", ctx) from error
    try:
        pipeline = run(recipe, out, intervals, workers=workers, progress=not quiet)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        raise InputRejected(str(error)) from error
    except (KeyboardInterrupt, Terminated) as stop:
        message = f"stopped; the same command goes on from the last checkpoint in {out}"
        raise Stopped(message, stop) from None
    echo(json.dumps({"pipeline": None if pipeline is None else str(pipeline)}))
    return ExitCode.INCOMPLETE if pipeline is None else ExitCode.DONE
