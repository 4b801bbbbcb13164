"""What ``i2am evaluate`` does: check, plan, run, say what came of it."""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from i2am.cli.calling import warn_of_size
from i2am.cli.errors import CommandError, ExitCode, InputRejected, Stopped, Terminated
from i2am.cli.runs import run_errors
from i2am.data.vitonhd import DataRejected
from i2am.evaluation.engines import Outcome, Share, open_jobs, run_here, run_on_ray, share_of
from i2am.evaluation.errors import OutOfMemory
from i2am.evaluation.memory import measure, need
from i2am.evaluation.opening import (
    Opened,
    Sources,
    default_size,
    open_run,
    stored_options,
    with_batch,
)
from i2am.evaluation.plan import Settings
from i2am.evaluation.store import Store
from i2am.evaluation.worker import Worker
from i2am.memory import available_memory, readable
from i2am.models.loading import ModelRejected
from i2am.wording import counted

log = logging.getLogger("i2am")

_SETTINGS = tuple(Settings.__dataclass_fields__)


class TooLarge(CommandError):
    """A batch did not fit into memory."""

    code = ExitCode.INCOMPLETE


@dataclass(frozen=True)
class Result:
    """What one command did for a run.

    Attributes:
        out: The run folder.
        samples: Samples that this process or its workers computed.
        failed: How many of them failed.
        remaining: Shards of this share that are not committed.
        problems: One sentence per shard that was given up.
        seconds: What it took, loading included.
    """

    out: Path
    samples: int
    failed: int
    remaining: int
    seconds: float
    problems: tuple[str, ...] = ()

    @property
    def code(self) -> ExitCode:
        """Incomplete if anything failed."""
        return ExitCode.INCOMPLETE if self.failed or self.remaining else ExitCode.DONE

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "out": str(self.out)}

    def __str__(self) -> str:
        made = f"{counted(self.samples, 'sample')} in {self.seconds:.0f} s"
        if not self.samples:
            made = "no sample was computed" if self.remaining else "all samples were there already"
        lines = [f"{self.out}: {made}"]
        if self.failed:
            lines.append(f"{self.failed} failed, i2am status {self.out} says why")
        lines += self.problems
        return "\n".join(lines)


@dataclass(frozen=True)
class DryRun:
    """What a run would take.

    Attributes:
        pairs: Samples by setting.
        shards: Shards that are still to be computed, of all.
        batch: Samples per call.
        memory: Bytes of memory, measured on a batch of one and of two.
        available: Free memory of the device, None where it cannot be told.
        disk: Bytes of all shards and images, estimated: images without compression.
        seconds: Of all that is to be computed, from a few measured steps.
    """

    pairs: Mapping[str, int]
    shards: tuple[int, int]
    batch: int
    memory: int
    available: int | None
    disk: int
    seconds: float

    @property
    def code(self) -> ExitCode:
        """Nothing failed."""
        return ExitCode.DONE

    def as_dict(self) -> dict[str, Any]:
        """JSON values, in bytes and seconds."""
        return asdict(self)

    def __str__(self) -> str:
        pairs = ", ".join(f"{count} {name}" for name, count in self.pairs.items())
        available = "unknown" if self.available is None else readable(self.available)
        return "\n".join(
            [
                f"samples             {pairs}",
                f"shards to compute   {self.shards[0]} of {self.shards[1]}",
                f"batch               {self.batch}",
                f"memory              {readable(self.memory)}, {available} available",
                f"disk                {readable(self.disk)} at most",
                f"time                about {_duration(self.seconds)} in one process",
                "nothing was written",
            ]
        )


def run(options: dict[str, Any]) -> Result | DryRun:
    """Everything that the command does.

    Raises:
        CommandError: With one sentence; a run that is there is as it was.
        OSError: The disk failed; what is committed stays.
    """
    started = time.monotonic()
    share = _share()
    sources = Sources(
        options["model"],
        options["data"],
        options["split"],
        "keep" if options["skip_missing"] else "raise",
    )
    with run_errors(), _memory():
        _look_at(options["out"])
        with _refusals():
            opened = _open(options, sources, share)
            if options["dry_run"]:
                return _dry_run(opened, options["out"], share)
        store = Store.create(options["out"], opened.plan)
        jobs = open_jobs(store, share=share, retry_failed=options["retry_failed"])
        outcome = _compute(store, opened, sources, jobs, share, options)
        remaining = len(open_jobs(store, share=share))
    problems = [f"shard {n} of {name}: {why}" for (name, n), why in outcome.given_up.items()]
    seconds = time.monotonic() - started
    failed = _failed(store)
    return Result(store.folder, outcome.samples, failed, remaining, seconds, tuple(problems))


def _share() -> Share:
    try:
        return share_of()
    except ValueError as error:
        raise InputRejected(str(error)) from error


def _look_at(out: Path) -> None:
    """Refuse a folder that cannot become the run before a model is loaded."""
    from i2am.evaluation import plan_file

    if plan_file.read(out) is None:
        plan_file.check_free(out)


def _open(options: dict[str, Any], sources: Sources, share: Share) -> Opened:
    from i2am.evaluation import plan_file

    asked = {name: options.get(name) for name in _SETTINGS}
    if options["pairs"] is not None:
        both = ("paired", "unpaired")
        asked["pairs"] = both if options["pairs"] == "both" else (options["pairs"],)
    asked["device"] = _device(options["device"])
    stored = plan_file.read(options["out"])
    if stored is not None:
        asked = stored_options(stored, asked)
    contents = options["hash_inputs"]
    if share.world > 1:
        log.info("worker %d of %d", share.rank, share.world)
    if share.rank and not log.isEnabledFor(logging.DEBUG):
        # what is to be said of the run, the first worker says
        log.setLevel(logging.ERROR)
    if asked["device"] == "cuda":
        torch.cuda.set_device(share.local_rank % torch.cuda.device_count())
    opened = open_run(sources, asked, contents=contents)
    if not opened.pipe.trained:
        log.warning("the weights of %s are random, not trained: scores mean nothing", sources.model)
    warn_of_size(sources.model, options["size"], default_size(opened.pipe))
    if opened.pipe.takes("pose") and not all("pose" in of.names for of in opened.data.values()):
        log.warning(
            "model %s takes poses and %s has no folder image-densepose: it gets all-black ones",
            sources.model,
            sources.data,
        )
    for name, data in opened.data.items():
        for problem in data.problems[:5]:
            log.warning("%s: %s", name, problem.message)
        for warning in data.mask_warnings() if share.rank == 0 else ():
            log.warning("%s: %s", name, warning)
    budget = options["memory_budget"]
    if budget is not None and stored is not None:
        log.info("the batch belongs to the run and stays %d", opened.settings.batch)
    elif budget is not None:
        found = need(opened)
        batch = found.largest(budget)
        if batch < 1:
            raise InputRejected(
                f"memory-budget must be at least the {readable(found.of(1))} that one sample "
                f"takes, got {readable(budget)}"
            )
        most = max(len(data) for data in opened.data.values())
        batch = min(batch, most, options["shard"] or most)
        log.info("a batch of %d takes about %s", batch, readable(found.of(batch)))
        opened = with_batch(opened, batch, sources, contents=contents)
    return opened


def _device(asked: str) -> str:
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise InputRejected("device cuda needs a CUDA GPU, and torch sees none")
    return asked


def _compute(
    store: Store,
    opened: Opened,
    sources: Sources,
    jobs: list[tuple[str, int]],
    share: Share,
    options: dict[str, Any],
) -> Outcome:
    total = sum(len(store.positions(*job)) for job in jobs)
    # tqdm writes to stderr; None: no bar where that is not a terminal, and one of all ranks
    hidden = True if share.rank else None
    hint = f"the same command goes on with what is missing in {store.folder}"
    with tqdm(total=total, unit="sample", disable=hidden) as bar:
        try:
            if options["engine"] == "ray" and jobs:
                return run_on_ray(store, sources, jobs, options["workers"], bar.update)
            worker = Worker(store, opened.pipe, opened.data, opened.settings)
            return run_here(worker, jobs, bar.update)
        except (KeyboardInterrupt, Terminated) as stop:
            raise Stopped(f"stopped; {hint}", stop) from None
        except ImportError as error:
            raise InputRejected(str(error)) from error


def _failed(store: Store) -> int:
    return sum(
        int(shard.status.count_nonzero())
        for setting in store.settings()
        for shard in store.shards(setting)
    )


def _dry_run(opened: Opened, out: Path, share: Share) -> DryRun:
    from i2am.evaluation import plan_file

    settings = opened.settings
    counts = {name: len(data) for name, data in opened.data.items()}
    shards = sum(-(-count // settings.shard) for count in counts.values())
    left = shards
    if plan_file.read(out) is not None:
        left = len(open_jobs(Store.open(out), share=share))
    found = need(opened)
    measured = measure(opened, settings.batch)
    seconds = measured.seconds * settings.steps / settings.batch
    height, width = settings.size
    pixels = 3 * height * width
    samples = sum(counts.values())
    return DryRun(
        counts,
        (left, shards),
        settings.batch,
        found.of(settings.batch),
        available_memory(opened.pipe.device),
        samples * (pixels + measured.map_bytes),
        seconds * samples * left / shards,
    )


@contextlib.contextmanager
def _memory() -> Iterator[None]:
    try:
        yield
    except OutOfMemory as error:
        raise TooLarge(str(error)) from error


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except (ModelRejected, DataRejected, FileNotFoundError, ValueError) as error:
        raise InputRejected(str(error)) from error


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else "1 min"
