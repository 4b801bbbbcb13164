"""``i2am report``: pages where you point at a patch, of recorded or evaluated samples."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import click

from i2am.cli import flags
from i2am.cli.errors import ExitCode
from i2am.cli.output import echo
from i2am.cli.types import FILE, count

log = logging.getLogger("i2am")

LARGE = 50_000_000
"""Bytes of a page from which on a folder serves its reader better."""
NAMED = 3
"""Samples named in a warning about left out ones; JSON has all."""


@click.command(
    short_help="Write pages where you point at a patch and see where it looked.",
    context_settings={"show_default": True},
)
@click.argument("runs", metavar="RUN...", type=FILE, nargs=-1, required=True)
@click.option(
    "-o",
    "--out",
    type=FILE,
    required=True,
    help="A name that ends in .html becomes one page with everything in it, any other a folder "
    "with index.html and files for each sample.",
)
@click.option("--title", show_default="the name of the first RUN", help="Name of the page.")
@click.option(
    "--setting",
    type=click.Choice(["paired", "unpaired"]),
    show_default="both",
    help="Samples of an evaluation to show.",
)
@click.option("--limit", type=count(), help="Show the first samples of each RUN and setting only.")
@click.option(
    "--data", type=FILE, show_default="that of the run", help="Data set of an evaluation."
)
@click.option(
    "--compress/--no-compress",
    default=True,
    help="Deflate the maps; browsers from before 2023 need pages without.",
)
@flags.overwrite
@flags.as_json
@flags.verbose
def report(
    runs: tuple[Path, ...],
    out: Path,
    title: str | None,
    setting: str | None,
    limit: int | None,
    data: Path | None,
    compress: bool,
    overwrite: bool,
    as_json: bool,
    verbose: bool,
) -> ExitCode:
    """Write pages that show the generated image and its reference, and answer when you point.

    RUN is an output folder of i2am record, or a run folder of i2am evaluate; samples of several are
    shown side by side on request. The pages open from disk and ask no server for anything. They
    appear complete or not at all.

    Exit codes: 0 done, 1 unexpected, 2 usage, 3 finished but samples are left out, 4 input
    rejected, 5 output folder in use or run damaged, 74 disk fault, 130 interrupted, 143 terminated.
    """
    if verbose:
        log.setLevel(logging.DEBUG)
    log.info("reading %s", ", ".join(map(str, runs)))
    from i2am.cli.reporting import Wanted, samples_of
    from i2am.viewer import write_report

    wanted = Wanted(runs, setting=setting, limit=limit, data=data)
    title = title or runs[0].resolve().name
    samples = samples_of(wanted)
    files = write_report(out, samples, title=title, overwrite=overwrite, compress=compress)
    _tell(wanted.left_out)
    page = out if out.suffix.lower() in (".html", ".htm") else out / files[0]
    if (size := page.stat().st_size) > LARGE:
        log.warning(
            "%s has %d MB, which a browser has to read at once; an --out without .html becomes a "
            "folder whose samples are read one at a time",
            page,
            size // 1_000_000,
        )
    if as_json:
        left_out = [{"id": id, "reason": reason} for id, reason in wanted.left_out.items()]
        echo(json.dumps({"page": str(page), "files": files, "left_out": left_out}))
    else:
        echo(str(page))
    return ExitCode.INCOMPLETE if wanted.left_out else ExitCode.DONE


def _tell(left_out: Mapping[str, str]) -> None:
    """Logs each reason once, with the samples that it concerns."""
    samples: dict[str, list[str]] = {}
    for id, reason in left_out.items():
        samples.setdefault(reason, []).append(id)
    for reason, ids in samples.items():
        more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
        log.warning("left out: %s%s: %s", ", ".join(ids[:NAMED]), more, reason)
