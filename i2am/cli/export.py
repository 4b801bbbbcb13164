"""``i2am export``: a run in formats that other tools read."""

import json
import logging
import sys
from pathlib import Path

import click

from i2am.cli import flags
from i2am.cli.errors import ExitCode, InputRejected
from i2am.cli.output import echo
from i2am.cli.runs import open_run
from i2am.cli.types import FILE
from i2am.wording import counted

log = logging.getLogger("i2am")


@click.command(short_help="Turn an evaluation into zarr or parquet.")
@click.argument("run", type=FILE)
@click.option("--zarr", type=FILE, help="Folder to write: maps and scores, for xarray.")
@click.option("--parquet", type=FILE, help="File to write: scores, one row for each sample.")
@flags.quiet
@flags.as_json
@flags.verbose
def export(
    run: Path, zarr: Path | None, parquet: Path | None, quiet: bool, as_json: bool, verbose: bool
) -> int:
    """Write what is committed in the folder RUN of i2am evaluate in another format.

    In zarr, a setting is a group of scores, with groups r2g and g2r of maps that have the axes
    sample, time, head, height, width; NaN is what failed or is not committed. The output appears
    complete or not at all.

    Exit codes: 0 done, 1 unexpected, 2 usage, 3 done, but samples are missing or failed, 4 nothing
    to export or a package is missing, 5 not a run, damaged, or the output exists, 74 disk fault,
    130 interrupted, 143 terminated.
    """
    if verbose:
        log.setLevel(logging.DEBUG)
    if (zarr is None) == (parquet is None):
        raise click.UsageError("Give either --zarr or --parquet.")
    log.info("reading %s", run)
    from i2am.evaluation.export import to_parquet, to_zarr
    from i2am.evaluation.summary import summarize

    progress = not quiet and sys.stderr.isatty()
    with open_run(run) as store:
        # what is damaged counts as not committed
        store.check_headers()
        try:
            if zarr is not None:
                to_zarr(store, zarr, progress=progress)
            if parquet is not None:
                to_parquet(store, parquet, progress=progress)
        except (ImportError, ValueError) as error:
            raise InputRejected(str(error)) from error
        summaries = summarize(store).values()
    ok, samples = sum(s.ok for s in summaries), sum(s.samples for s in summaries)
    out = str(zarr or parquet)
    if as_json:
        echo(json.dumps({"run": str(run), "out": out, "ok": ok, "samples": samples}))
    else:
        rest = "" if ok == samples else "; the others failed or are not committed"
        echo(f"{out}: {ok} of {counted(samples, 'sample')}{rest}")
    return ExitCode.DONE if ok == samples else ExitCode.INCOMPLETE
