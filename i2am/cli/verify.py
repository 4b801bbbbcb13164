"""``i2am verify``: whether a run is as it was written."""

import json
import logging
import sys
from pathlib import Path

import click

from i2am.cli import flags
from i2am.cli.errors import ExitCode
from i2am.cli.output import echo
from i2am.cli.runs import open_run
from i2am.cli.types import FILE
from i2am.wording import counted

log = logging.getLogger("i2am")


@click.command(short_help="Check every checksum of an evaluation.")
@click.argument("run", type=FILE)
@flags.quiet
@flags.as_json
@flags.verbose
def verify(run: Path, quiet: bool, as_json: bool, verbose: bool) -> int:
    """Compare all shards and images in the folder RUN of i2am evaluate with their checksums.

    Prints one line for each problem, and changes nothing. A damaged shard, or one with a damaged
    image, is computed again once its file is deleted.

    Exit codes: 0 no problem, 1 unexpected, 2 usage, 5 problems or not a run, 74 disk fault,
    130 interrupted, 143 terminated.
    """
    if verbose:
        log.setLevel(logging.DEBUG)
    log.info("reading %s", run)
    with open_run(run) as store:
        problems = store.verify(progress=not quiet and sys.stderr.isatty())
        shards = sum(len(store.committed(setting)) for setting in store.settings())
    if as_json:
        echo(json.dumps({"run": str(run), "shards": shards, "problems": problems}))
    else:
        good = f"{run}: {counted(shards, 'shard')} and all images are as they were written"
        echo(*(problems or [good]))
    if problems:
        log.warning(
            "%s; delete the shards concerned, then i2am evaluate computes them again",
            counted(len(problems), "problem"),
        )
    return ExitCode.CONFLICT if problems else ExitCode.DONE
