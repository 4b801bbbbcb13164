"""``i2am status``: how far a run is."""

import json
import logging
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import click

from i2am.cli import flags
from i2am.cli.errors import ExitCode
from i2am.cli.output import echo
from i2am.cli.runs import open_run
from i2am.cli.types import FILE
from i2am.wording import Footnotes, counted

if TYPE_CHECKING:
    from i2am.evaluation.summary import Summary

log = logging.getLogger("i2am")

_LISTED = 20
"""Failed samples in the text; JSON has all."""


@click.command(short_help="Say how far an evaluation is.")
@click.argument("run", type=FILE)
@flags.as_json
@flags.verbose
def status(run: Path, as_json: bool, verbose: bool) -> int:
    """Say what is committed in the folder RUN of i2am evaluate, what failed and what is missing.

    The run may go on at the same time; nothing in it is changed.

    Exit codes: 0 every sample is there, 1 unexpected, 2 usage, 3 some are missing or failed,
    5 not a run or damaged, 74 disk fault, 130 interrupted, 143 terminated.
    """
    if verbose:
        log.setLevel(logging.DEBUG)
    log.info("reading %s", run)
    from i2am.evaluation.summary import summarize

    with open_run(run) as store:
        summaries = summarize(store)
        fingerprint = store.plan["fingerprint"]
    complete = all(summary.complete for summary in summaries.values())
    if as_json:
        result = {
            "run": str(run),
            "fingerprint": fingerprint,
            "complete": complete,
            "settings": {setting: summary.as_dict() for setting, summary in summaries.items()},
        }
        echo(json.dumps(result, allow_nan=False))
    else:
        footnotes = Footnotes()
        for setting, summary in summaries.items():
            echo(*_lines(setting, summary, footnotes))
        if footnotes.lines:
            echo(*footnotes.lines)
    return ExitCode.DONE if complete else ExitCode.INCOMPLETE


def _lines(setting: str, summary: "Summary", footnotes: Footnotes) -> list[str]:
    present = summary.shards - sum(last - first + 1 for first, last in summary.missing)
    lines = [
        f"{setting}: {summary.committed} of {counted(summary.samples, 'sample')} committed, "
        f"in {present} of {counted(summary.shards, 'shard')}; {len(summary.failed)} failed"
    ]
    if summary.missing:
        some = [
            f"{first}-{last}" if first < last else f"{first}" for first, last in summary.missing
        ]
        lines.append(f"  missing shards: {', '.join(some)}")
    lines += [f"  {problem}" for problem in summary.damaged]
    for id, reason in islice(summary.failed.items(), _LISTED):
        lines.append(f"  {id} failed: {reason.message} ({reason.code})")
    if len(summary.failed) > _LISTED:
        lines.append(f"  {len(summary.failed) - _LISTED} more failed; --json lists all")
    for score, reasons in summary.undefined.items():
        why = ", ".join(f"{n} {footnotes.mark(of.message)}" for of, n in reasons.items())
        samples = counted(summary.ok, "sample")
        lines.append(f"  {score} is undefined in {sum(reasons.values())} of {samples}: {why}")
    return lines
