"""``i2am score``: every number of a run again, from its committed shards and pictures alone."""

import json
import logging
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from i2am.cli import flags
from i2am.cli.errors import ExitCode, Stopped, Terminated
from i2am.cli.output import echo
from i2am.cli.runs import open_run
from i2am.cli.types import FILE, count
from i2am.wording import Footnotes, counted

if TYPE_CHECKING:
    from i2am.evaluation.scores.scoring import RunScores

log = logging.getLogger("i2am")

# as in i2am.evaluation.scores, whose import would make every command slow
_METRICS = ("imacs", "ssim", "lpips", "fid", "kid")
_PROTOCOLS = ("i2am", "ladi", "hr-viton", "catvton")


class _Names(click.ParamType[tuple[str, ...]]):
    """Names separated by commas."""

    name = "names"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        names = value if isinstance(value, tuple) else tuple(value.split(","))
        for name in names:
            if name not in _METRICS:
                self.fail(f"{name!r} is none of {', '.join(_METRICS)}.", param, ctx)
        return names


@click.command(short_help="Compute the scores of runs of `i2am evaluate`, or of a part of one.")
@click.argument("runs", metavar="RUN [RUN ...]", nargs=-1, required=True, type=FILE)
@click.option(
    "--metrics", type=_Names(), default=_METRICS, help=f"Any of {','.join(_METRICS)}; all of them."
)
@click.option(
    "--protocol",
    type=click.Choice(_PROTOCOLS),
    default="i2am",
    show_default=True,
    help="Whose convention the image metrics follow.",
)
@click.option("--real", type=FILE, help="Folder of the real pictures; that of the data set.")
@click.option("--lpips", metavar="WEIGHTS", type=FILE, help="Backbone of LPIPS, by torchvision.")
@click.option(
    "--inception", metavar="WEIGHTS", type=FILE, help="Inception of FID, by torch-fidelity."
)
@click.option(
    "--bootstrap",
    "replicates",
    type=count(0),
    default=1000,
    show_default=True,
    help="Resamples of the confidence intervals; 0 for none.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Of the resamples.")
@click.option("-o", "--out", type=FILE, help="Folder for the table and correlations of all runs.")
@flags.as_json
@flags.quiet
@flags.verbose
def score(
    runs: tuple[Path, ...],
    metrics: tuple[str, ...],
    protocol: str,
    replicates: int,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **files: Any,
) -> int:
    """Score what is committed of each RUN and write RUN/results.

    IMACS comes from the shards, SSIM and LPIPS compare paired pictures with the real ones, FID and
    KID the set of unpaired pictures. Weights are local files; nothing is downloaded. A metric that
    cannot be computed says why, and the others go on. A run may still be written to.

    With several runs, one for each model, the table has all of them, followed by the rank
    correlation of IMACS with the image metrics.

    Exit codes: 0 done, 1 unexpected, 2 usage, 3 part of a run or of the metrics is missing,
    5 a run is damaged or no run, 74 disk fault, 130 interrupted, 143 terminated.
    """
    if verbose:
        log.setLevel(logging.DEBUG)
    if len({run.resolve() for run in runs}) < len(runs):
        raise click.UsageError("the same RUN is given twice.")
    log.info("reading %s", ", ".join(map(str, runs)))
    from i2am.evaluation.scores.protocols import PROTOCOLS
    from i2am.evaluation.scores.results import RESULTS, write_results
    from i2am.evaluation.scores.scoring import Scoring, score_run
    from i2am.evaluation.scores.tables import labels
    from i2am.files import check_place, inner_folder

    scoring = Scoring(metrics=metrics, protocol=PROTOCOLS[protocol], replicates=replicates, **files)
    scored = []
    # all first: what is no run, or cannot be written, is not found out after hours
    if out is not None:
        check_place(out, kind="folder")
    with ExitStack() as stack:
        stores = [stack.enter_context(open_run(run)) for run in runs]
        for store in stores:
            inner_folder(store.folder, RESULTS)
        for store in stores:
            try:
                scores = score_run(store, scoring, progress=not quiet and sys.stderr.isatty())
                write_results(store.folder, scores)
            except (KeyboardInterrupt, Terminated) as stop:
                hint = "the same command goes on from the shards whose pictures were measured"
                raise Stopped(f"stopped while scoring {store.folder}; {hint}", stop) from None
            _tell(store.folder, scores)
            scored.append(scores)
    documents = [scores.document for scores in scored]
    names = labels(documents, [str(run) for run in runs])
    complete = all(scores.complete for scores in scored)
    complete &= _report(scored, names, out=out, as_json=as_json)
    return ExitCode.DONE if complete else ExitCode.INCOMPLETE


def _tell(run: Path, scores: "RunScores") -> None:
    for name, of in scores.document["computed_with"].items():
        if not of.get("weights", {"published": True})["published"]:
            log.warning(
                f"the weights of {name} are not the published ones: no paper has numbers like these"
            )
    for setting, of in scores.document["settings"].items():
        if of["n_missing"]:
            shards = f"{of['shards_committed']} of {of['shards_expected']} shards"
            log.warning(f"{run}: {shards} of {setting} are committed, the scores are of these")
        if of["n_failed"]:
            failed = counted(of["n_failed"], "sample")
            log.warning(f"{run}: {failed} of {setting} failed and have no scores")


def _report(
    scored: "list[RunScores]", names: list[str], *, out: Path | None, as_json: bool
) -> bool:
    """Print and write what concerns all runs; whether nothing of it is missing."""
    from i2am.evaluation.scores.comparison import compare
    from i2am.evaluation.scores.tables import correlation_table, detail_table, paper_table

    documents = [scores.document for scores in scored]
    comparison = compare(scored, names)
    if out is not None:
        comparison.write(out)
    for obstacle in comparison.obstacles:
        log.warning("%s", obstacle)
    if as_json:
        document = documents[0] if len(documents) == 1 else comparison.document
        echo(json.dumps(document, allow_nan=False))
        return not comparison.obstacles
    echo(*paper_table(documents, names))
    footnotes = Footnotes()
    for name, document in zip(names, documents, strict=True):
        echo("", name, *detail_table(document, footnotes))
    if comparison.correlations:
        echo("", *correlation_table(comparison.correlations, footnotes))
    if footnotes.lines:
        echo("", *footnotes.lines)
    return not comparison.obstacles
