"""``i2am evaluate``: a model over a data set, in shards that are never computed twice."""

import json
import logging
from typing import Any

import click

from i2am.cli import flags
from i2am.cli.output import echo
from i2am.cli.types import AT_ONCE, FILE, NAME, BytesType, NumberType, SizeType, count

log = logging.getLogger("i2am")


@click.command(
    short_help="Run a model over a data set and score its attribution; resumes.",
    context_settings={"show_default": True},
)
@click.argument("model", type=NAME)
@click.option("--data", type=FILE, required=True, help="Folder in the layout of VITON-HD.")
@click.option("-o", "--out", type=FILE, required=True, help="Folder of the run.")
@click.option("--split", type=click.Choice(["test", "train"]), default="test")
@click.option(
    "--pairs",
    type=click.Choice(["both", "paired", "unpaired"]),
    show_default="both",
    help="Garments: people's own, those that the list names, or one after the other.",
)
@click.option(
    "--sampler",
    type=click.Choice(["paper", "official"]),
    help="Scheduler, steps and guidance of the paper, or of the model's published code.",
)
@click.option(
    "--steps",
    type=count(),
    show_default="the sampler's, else 50",
    help="Denoising steps.",
)
@click.option(
    "--guidance",
    type=NumberType(0),
    show_default="the sampler's, else the model's",
    help="Guidance scale.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    show_default="0",
    help="With a sample's name the seed of its noise.",
)
@click.option(
    "--time-groups",
    type=count(),
    show_default="5",
    help="Groups of steps kept apart in the maps, at most one per step.",
)
@click.option(
    "--preset",
    type=click.Choice(["paper", "official"]),
    show_default="paper",
    help="How attention is recorded; official keeps reference tokens apart and takes far more "
    "memory.",
)
@click.option(
    "--size",
    type=SizeType(),
    metavar=SizeType.name,
    help="Pixels of the images; by default what the model makes of 1024x768.",
)
@click.option(
    "--batch",
    type=count(),
    show_default="8, or the shard if that is less",
    help="Samples per call.",
)
@click.option(
    "--memory-budget",
    type=BytesType(),
    metavar=BytesType.name,
    help="Take the largest batch that fits, by a measurement before the run; instead of --batch.",
)
@click.option(
    "--shard",
    type=count(),
    show_default="16, or the batch if that is more",
    help="Samples committed together.",
)
@click.option(
    "--maps",
    type=click.Choice(["float16", "float32", "none"]),
    show_default="float16",
    help="What is stored of the maps, per time group and head; scores never depend on it.",
)
@click.option(
    "--attach",
    type=click.Choice(["beside", "fused"]),
    show_default="beside",
    help="As i2am.record.",
)
@click.option(
    "--offload",
    type=click.Choice(["none", "model", "sequential"]),
    show_default="none",
    help="Keep parts of the model in main memory while a GPU does not need them.",
)
@click.option("--vae-slicing", is_flag=True, default=None, help="Decode one image at a time.")
@click.option("--vae-tiling", is_flag=True, default=None, help="Decode images in tiles.")
@click.option(
    "--stretch",
    is_flag=True,
    default=None,
    help="Squeeze pictures of another shape instead of refusing them.",
)
@click.option("--skip-missing", is_flag=True, help="Let pairs without all their files fail, alone.")
@click.option(
    "--hash-inputs",
    is_flag=True,
    help="Tell data sets apart by their contents, not by sizes alone.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), show_default="float32"
)
@click.option(
    "--threads",
    type=count(most=AT_ONCE),
    show_default="torch's",
    help="Of torch on the CPU; they decide last bits.",
)
@click.option(
    "--engine",
    type=click.Choice(["here", "ray"]),
    default="here",
    help="Compute in this process (its share, under torchrun, accelerate or srun), or on workers "
    "that Ray keeps alive.",
)
@click.option(
    "--workers",
    type=count(most=AT_ONCE),
    show_default="one per GPU, else one",
    help="Of Ray.",
)
@click.option("--retry-failed", is_flag=True, help="Compute shards with failed samples again.")
@flags.dry_run
@flags.as_json
@flags.verbose
@click.pass_context
def evaluate(ctx: click.Context, as_json: bool, verbose: bool, **options: Any) -> int:
    """Paint every pair of a data set with MODEL, record its attribution and score it.

    MODEL is a built-in name (pocket) or a folder in diffusers layout. Images, maps and scores of
    some samples at a time make a shard, which appears in the run folder whole or not at all. The
    same command goes on where it was stopped or killed, and computes the same bytes. `i2am score`
    makes the tables.

    Exit codes: 0 done, 1 unexpected, 2 usage, 3 finished but samples failed, or out of memory,
    4 input rejected, 5 the folder holds another run, 74 disk fault, 130 interrupted,
    143 terminated.
    """
    if verbose:
        log.setLevel(logging.DEBUG)
    if options["batch"] is not None and options["memory_budget"] is not None:
        raise click.UsageError("--memory-budget picks the batch, leave --batch out.", ctx)
    log.info("loading %s, and the pairs of %s", options["model"], options["data"])
    from i2am.cli.evaluating import run

    result = run(options)
    echo(*[json.dumps(result.as_dict(), allow_nan=False)] if as_json else result.lines)
    return result.code
