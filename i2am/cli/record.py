"""``i2am record``: one image, its attribution maps, pictures and scores."""

import json
import logging
from typing import Any

import click

from i2am.cli import flags
from i2am.cli.output import echo
from i2am.cli.settings import Settings
from i2am.cli.types import FILE, NAME, BoxType, NumberType, SizeType, count

log = logging.getLogger("i2am")


@click.command(
    short_help="Record one image, its attribution maps, pictures and scores.",
    context_settings={"show_default": True},
)
@click.argument("model", type=NAME)
@click.option("--person", type=FILE, required=True, help="Image of the person or scene.")
@click.option("--mask", type=FILE, required=True, help="White where it is to be painted anew.")
@click.option("--reference", type=FILE, required=True, help="Image to paint after.")
@click.option("--pose", type=FILE, help="Pose rendering, for models that take one.")
@click.option(
    "--agnostic",
    type=FILE,
    help="The person without what is to be painted anew, for models that take one; by default the "
    "mask is painted grey.",
)
@click.option(
    "--warped", type=FILE, help="The reference as a warp network laid it on the person: DCI-VTON."
)
@click.option("--warped-mask", type=FILE, help="White on the object in --warped.")
@click.option(
    "--reference-mask",
    type=FILE,
    help="White on the object in the reference; its votes count, and DCI-VTON cuts it out. auto "
    "makes it from the reference's alpha channel or plain background.",
)
@click.option(
    "--sampler",
    type=click.Choice(["paper", "official"]),
    help="Scheduler, steps and guidance of the paper, or of the model's published code; by default "
    "the scheduler in the model's folder.",
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
    show_default="the sampler's, else 5; DCI-VTON: 1",
    help="Guidance scale.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=Settings.seed,
    help="Seed of all noise.",
)
@click.option(
    "--time-groups",
    type=count(),
    default=Settings.time_groups,
    help="Groups of steps kept apart, at most one per step.",
)
@click.option(
    "--region",
    "regions",
    type=BoxType(),
    metavar=BoxType.name,
    multiple=True,
    help="Rectangle of the person, in pixels, to ask the reference for; may be repeated.",
)
@click.option(
    "--preset",
    type=click.Choice(["paper", "official"]),
    default=Settings.preset,
    help="How maps are recorded, read and drawn: as in the paper, or as in its published code, "
    "which keeps the reference tokens apart and takes far more memory.",
)
@click.option(
    "--guidance-branch",
    type=click.Choice(["conditional", "unconditional", "both"]),
    default=Settings.guidance_branch,
    help="Half of guidance to record.",
)
@click.option(
    "--size",
    type=SizeType(),
    metavar=SizeType.name,
    help="Pixels to generate; by default what the model was made for (paint-by-example: of that "
    "area at most, in the person's shape; dci-vton: resized to it in the end).",
)
@click.option(
    "--paste-back/--no-paste-back",
    default=None,
    show_default="only DCI-VTON does",
    help="Keep the person's pixels outside the mask.",
)
@click.option(
    "--report/--no-report",
    default=Settings.report,
    help="Record every patch against every patch, and write the page where you point at one.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default=Settings.device)
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default=Settings.dtype
)
@click.option("-o", "--out", type=FILE, default=Settings.out, help="Folder to write.")
@flags.dry_run
@flags.overwrite
@flags.as_json
@flags.verbose
@click.pass_context
def record(
    ctx: click.Context, dry_run: bool, as_json: bool, verbose: bool, **options: Any
) -> int | None:
    """Paint the masked part of a person after a reference, and record the attribution.

    MODEL is a built-in name (pocket) or a folder in diffusers layout. The output folder then holds
    the image, overlays of both maps, sheets per time group, head and region, a page where you point
    at a patch and see where it looked, the maps themselves, scores and the settings. It appears
    complete or not at all.

    Exit codes: 0 done, 1 unexpected, 2 usage, 3 finished but incomplete, 4 input rejected, 5 output
    folder in use, 74 disk fault, 130 interrupted, 143 terminated.
    """
    if verbose:
        log.setLevel(logging.DEBUG)
    try:
        settings = Settings(**options)
    except ValueError as error:
        raise click.UsageError(f"{error}.", ctx) from error
    log.info("loading %s", settings.model)
    from i2am.cli.recording import dry_record, full_record

    if dry_run:
        estimate = dry_record(settings)
        echo(*[json.dumps(estimate.as_dict())] if as_json else estimate.lines)
        return None
    result = full_record(settings)
    echo(*[json.dumps(result.as_dict())] if as_json else result.lines)
    return result.code
