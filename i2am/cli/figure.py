"""``i2am figure``: the paper's figures of recorded runs."""

import json
import logging
from pathlib import Path
from typing import Any

import click

from i2am.cli import flags
from i2am.cli.output import echo
from i2am.cli.types import FILE, NumberType

log = logging.getLogger("i2am")

# known without importing numpy; a test compares them with i2am.plots.recorded
WHICH = (
    *("4", "5", "6", "7", "8", "9", "time_and_head", "time_groups", "heads", "reference_maps"),
    *("specific_reference", "layers", "models", "all"),
)


@click.command(
    short_help="Draw the paper's figures of recorded runs.",
    context_settings={"show_default": True},
)
@click.argument("runs", metavar="RUN...", type=FILE, nargs=-1, required=True)
@click.option(
    "--which",
    type=click.Choice(WHICH),
    multiple=True,
    default=["all"],
    metavar="FIGURE",
    help="4 time_and_head, 5 time_groups, 6 and 7 heads, 8 reference_maps, 9 specific_reference, "
    "layers, models, all that can be drawn; may be repeated.",
)
@click.option(
    "--votes",
    type=click.Choice(["uniform", "mask"]),
    default="uniform",
    help="R2G: every reference token votes, or those in the reference mask.",
)
@click.option(
    "--weights",
    type=click.Choice(["uniform", "mask"]),
    default="uniform",
    help="G2R: all generated patches count, or those in the mask.",
)
@click.option(
    "--style",
    type=click.Choice(["default", "paper"]),
    default="default",
    help="Perceptual colours that can be printed, or those of the paper.",
)
@click.option(
    "--threshold",
    type=NumberType(0, 1, max_open=True),
    default=0.4,
    help="Values up to this, of 1, are left out.",
)
@click.option("--shared", is_flag=True, help="One scale for all maps of a row.")
@click.option(
    "--preset",
    type=click.Choice(["paper", "official"]),
    show_default="as recorded",
    help="How maps are read and drawn.",
)
@click.option(
    "--guidance-branch",
    type=click.Choice(["conditional", "unconditional"]),
    show_default="the first recorded",
    help="Half of guidance to draw.",
)
@click.option("--format", "kind", type=click.Choice(["png", "jpg", "pdf"]), default="png")
@click.option("--dpi", type=click.IntRange(50, 1200), default=150, help="Dots per inch.")
@click.option("-o", "--out", type=FILE, required=True, help="Folder to write.")
@flags.overwrite
@flags.as_json
@flags.verbose
def figure(
    runs: tuple[Path, ...],
    which: tuple[str, ...],
    out: Path,
    overwrite: bool,
    as_json: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Draw the paper's figures of recorded runs; needs matplotlib, the extra "plots".

    RUN is an output folder of i2am record, or several: they become rows of figures 4 to 7, with
    guidance and without say, and columns of models; the other figures are made of each. The output
    folder appears complete or not at all.

    Exit codes: 0 done, 1 unexpected, 2 usage, 4 input rejected, 5 output folder in use, 74 disk
    fault, 130 interrupted, 143 terminated.
    """
    if verbose:
        log.setLevel(logging.DEBUG)
    log.info("reading %s", ", ".join(map(str, runs)))
    from i2am.cli.drawing import Drawing, draw

    drawing = Drawing(runs=runs, which=which, out=out, overwrite=overwrite, **options)
    files = draw(drawing)
    if as_json:
        echo(json.dumps({"out": str(out), "files": files}))
    else:
        echo(*(str(out / name) for name in files))
