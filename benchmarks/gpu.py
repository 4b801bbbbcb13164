"""Everything that only a GPU can tell, on a machine without network that is at hand for minutes.

    python benchmarks/gpu.py --seconds 200 -o results     # correctness, calls, profile
    python benchmarks/gpu.py --seconds 400 -o results     # what failed, whole steps, memory

Needs torch, triton, numpy and pytest; packages that lie as wheels in ``.wheels`` (``make wheels``)
are used where the machine lacks them. Each step is a process of its own, each row a line of
``rows.jsonl`` that is written as it comes: a run that is cut short loses one row, and the next one
goes on, first with what failed. ``--again STEP`` measures a step anew.
"""

import argparse
import importlib.metadata
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ledger import Ledger, Line

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WHEELS = ROOT / ".wheels"
GRACE = 5  # s that a stopped step has to end by itself
LIMIT = 60  # s of one test
ERROR = 1500  # characters kept of an error
LEFT_OUT = 75  # exit status of a step that this machine does not have
PROCESS = "process"  # row that says how a step ended

Rows = Iterator[tuple[str, Callable[[], Line]]]


@dataclass(frozen=True)
class Step:
    """What a process measures, for how many seconds at most.

    Args:
        limit: In seconds.
        rows: Yields the names of its rows, and what measures each.
        tests: Arguments of pytest instead, each test being a row.
        packages: What it needs beside torch, triton, numpy and pytest.
        processes: How many run the tests side by side, at most.
    """

    limit: int
    rows: Callable[[argparse.Namespace], Rows] | None = None
    tests: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    processes: int = 14


# --- what is measured ----------------------------------------------------------------------------


def machine(options: argparse.Namespace) -> Rows:
    """The card, what it can do at most, and which attention PyTorch takes."""
    import harness
    import sdpa
    from shapes import GROUPS

    settings = _settings(options)
    yield "about", lambda: harness.describe(settings.device) | {"card": _card()}
    yield "ceilings", lambda: sdpa.ceilings(settings)
    for shape in GROUPS[options.shapes]:
        yield f"backends, {shape}", partial(sdpa.backends, shape, settings)


def calls(options: argparse.Namespace) -> Rows:
    """Attention calls, recorded in every way."""
    import harness
    import operators
    from shapes import GROUPS

    for batch in (8, 1):
        settings = _settings(options, batch=batch)
        for shape in GROUPS[options.shapes]:
            for way in operators.WAYS:

                def measure(settings: Any = settings, shape: Any = shape, way: str = way) -> Line:
                    row = harness.Row()
                    operators.measure(row, settings, shape, way)
                    return row.result()

                yield f"{shape}, batch {batch}, {way}", measure


def profile(options: argparse.Namespace) -> Rows:
    """Two kernels' counters, where NVIDIA's profiler is."""
    import sdpa
    from shapes import GROUPS

    for shape in GROUPS[options.shapes][:2]:
        yield str(shape), partial(sdpa.profile, shape, _settings(options))


def steps(options: argparse.Namespace) -> Rows:
    """Guided UNet steps: recorded in every way, from a CUDA graph, compiled."""
    import harness
    import unet_steps

    small, large = ("tiny", "tiny") if options.dry_run else ("sd15", "sdxl")

    def measured(measure: Callable[..., None], size: str, batch: int, *arguments: Any) -> Line:
        row = harness.Row()
        measure(row, _settings(options, batch=batch), size, batch, *arguments)
        return row.result()

    def rows(size: str, batch: int) -> Rows:
        name = f"{size}, batch {batch}, guidance"
        for way in unet_steps.WAYS:
            yield f"{name}, {way}", partial(measured, unet_steps.measure, size, batch, way, True)
        yield f"{name}, graph", partial(measured, unet_steps.measure_graph, size, batch)

    yield from rows(small, 8)
    yield from rows(small, 1)
    compiled = partial(measured, unet_steps.measure_compiled, small, 8)
    yield f"{small}, batch 8, guidance, compiled", compiled
    yield from rows(large, 1)
    yield from rows(large, 8)


def batches(options: argparse.Namespace) -> Rows:
    """How many samples fit a card."""
    import budgets

    yield from budgets.rows(_settings(options))


STEPS = {
    "machine": Step(40, machine),
    "tests": Step(150, tests=("tests/kernels", "--ignore=tests/kernels/test_ahead_of_time.py")),
    "calls": Step(120, calls),
    "profile": Step(40, profile),
    # few tests, and many seconds until diffusers is imported
    "recorder": Step(
        60, tests=("tests/adapters", "-m", "gpu"), packages=("diffusers",), processes=4
    ),
    "steps": Step(240, steps, packages=("diffusers",)),
    "batches": Step(120, batches, packages=("diffusers",)),
}


# --- the process of a step ------------------------------------------------------------------------


def measure(step: str, ledger: Ledger, options: argparse.Namespace) -> None:
    """Measure what a step has left, row by row; another process goes on where no kernel runs."""
    from harness import LeftOut, is_lost

    try:
        settled = ledger.settled(step)
        for name, work in STEPS[step].rows(options):
            if name not in settled:
                ledger.announce(step, name)
                ledger.write(step, name, _found(work))
                if is_lost():
                    raise SystemExit("no kernel runs any more in this process")
    except LeftOut as reason:
        print(reason)
        raise SystemExit(LEFT_OUT) from None


def _found(work: Callable[[], Line]) -> Line:
    import torch
    from harness import LeftOut

    start = time.monotonic()
    try:
        found = work()
    except LeftOut as reason:
        return {"left_out": str(reason)}
    except torch.OutOfMemoryError:
        return {"left_out": "out of memory"}
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"[:ERROR]}
    return found | {"took_s": round(time.monotonic() - start, 2)}


def _settings(options: argparse.Namespace, batch: int = 8) -> Any:
    import harness
    import torch

    if options.dry_run:
        return harness.Settings(torch.device("cpu"), torch.float32, (1,), 1, 5, impl="fused")
    return harness.Settings(torch.device("cuda"), torch.bfloat16, (batch,), options.rounds, 50)


def _is_here(package: str) -> bool:
    with suppress(ModuleNotFoundError):
        return find_spec(package) is not None
    return False


def _card() -> str | None:
    """What NVIDIA's own tool says of the card."""
    query = "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit"
    with suppress(OSError):
        return subprocess.run(
            ["nvidia-smi", query, "--format=csv"], capture_output=True, text=True
        ).stdout
    return None


# --- the run --------------------------------------------------------------------------------------


def command(step: str, ledger: Ledger, options: argparse.Namespace, folder: Path) -> list[str]:
    """What a step runs."""
    if not STEPS[step].tests:
        same = [f"--{name}={getattr(options, name)}" for name in ("rounds", "shapes")]
        flags = ["--dry-run"] * options.dry_run
        here = ["--process", step, "--run", ledger.run, "-o", str(options.out)]
        return [sys.executable, str(HERE / "gpu.py"), *here, *same, *flags]
    settled = folder / "settled.txt"
    settled.write_text("\n".join(sorted(ledger.settled(step))), encoding="utf-8")
    parallel = []
    if _is_here("xdist"):
        most = 2 if options.dry_run else STEPS[step].processes
        processes = max(1, min(most, (os.cpu_count() or 1) - 2))
        parallel = ["-n", str(processes), "--dist", "worksteal", "--max-worker-restart", "50"]
    if _is_here("pytest_timeout"):
        parallel += ["--timeout", str(LIMIT)]
    plugin = ["-p", "gpu_tests", "--ledger", str(ledger.path), "--run", ledger.run]
    plugin += ["--step", step, "--settled", str(settled)]
    # a file that needs a package which is missing costs only itself
    pytest = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--continue-on-collection-errors"]
    pytest += ["-p", "no:benchmark"]  # it warns once in every process
    return [*pytest, *plugin, *parallel, *(options.tests or STEPS[step].tests)]


def run(step: str, ledger: Ledger, options: argparse.Namespace, folder: Path, end: float) -> None:
    """Run a step until it is done, its time is over, or it ends twice at the same place."""
    for package in STEPS[step].packages:
        if not _is_here(package):
            ledger.write(step, PROCESS, {"left_out": f"{package} is not installed"})
            return
    start = time.monotonic()
    end = min(end, start + STEPS[step].limit)
    before, ended, how = None, None, ""
    log = options.out / "log.txt"
    while time.monotonic() < end and before != (before := ledger.settled(step)):
        with log.open("ab") as output:
            output.write(f"\n=== {step}\n".encode())
            output.flush()
            process = subprocess.Popen(
                command(step, ledger, options, folder),
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(options, folder),
                start_new_session=True,
            )
            try:
                ended = process.wait(end - time.monotonic())
            except subprocess.TimeoutExpired:
                _end(process)
                ended, how = None, "stopped when its time was over"
                break
            how = f"ended with status {ended}"
        # pytest ends with 1 where tests failed, which are rows of their own, with 5 if none is left
        if ended == 0 or (ended in (1, 5) and STEPS[step].tests):
            ended = 0
            break
    if before is None:
        ledger.write(step, PROCESS, {"left_out": "no time was left"})
        return
    found: Line = {"took_s": round(time.monotonic() - start, 1)}
    last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    if ended == LEFT_OUT:
        found["left_out"] = last
    elif ended != 0:
        found["error"] = f"{how}: {last[-300:]}"
    ledger.write(step, PROCESS, found)


def _end(process: subprocess.Popen) -> None:
    """End a step and the processes that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def install_wheels(folder: Path) -> None:
    """Install into ``folder`` what lies in ``.wheels`` and this machine lacks."""
    missing = []
    for wheel in sorted(WHEELS.glob("*.whl")):
        try:
            importlib.metadata.version(wheel.name.split("-")[0])
        except importlib.metadata.PackageNotFoundError:
            missing.append(str(wheel))
    if missing:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        options = ["--no-index", "--no-deps", "--no-compile", "--target", str(folder)]
        if subprocess.run([*pip, *options, *missing]).returncode:
            print("the wheels could not be installed; what needs them is left out", flush=True)
        sys.path.insert(0, str(folder))


def environment(options: argparse.Namespace, folder: Path) -> dict[str, str]:
    """What a step's process sees: the checkout and the carried packages, installed or not."""
    path = [str(ROOT), str(HERE), str(folder), os.environ.get("PYTHONPATH", "")]
    given = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONUNBUFFERED": "1"}
    # the tests fill fresh memory with NaN, which needs deterministic algorithms
    given["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if options.dry_run:
        given["TRITON_INTERPRET"] = "1"
    return {**os.environ, **given}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=HERE / "results" / "gpu")
    parser.add_argument("--seconds", type=float, default=200, help="for everything")
    parser.add_argument("--only", choices=STEPS, action="append", help="these steps")
    parser.add_argument("--again", choices=STEPS, action="append", default=[], help="from anew")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shapes", default="gpu", help="group of attention shapes")
    parser.add_argument("--tests", type=shlex.split, help="arguments of pytest, in one")
    parser.add_argument("--dry-run", action="store_true", help="small, under the interpreter")
    parser.add_argument("--commit", default=_commit(), help="where this is no checkout")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--process", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.run = options.run or f"{time.strftime('%Y-%m-%d %H:%M:%S')} {options.commit}"
    options.out = options.out.resolve()
    if options.dry_run and options.shapes == "gpu":
        options.shapes = "tiny"
    return options


def _commit() -> str:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    with suppress(OSError):
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"


def main() -> None:
    """Run the steps in order, each as far as time allows."""
    sys.path.insert(0, str(ROOT))  # the checkout need not be installed
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # before the options, which depend on what is there
        if "--process" not in sys.argv:
            install_wheels(folder)
        options = parse()
        options.out.mkdir(parents=True, exist_ok=True)
        ledger = Ledger(options.out / "rows.jsonl", options.run)
        if options.process:
            measure(options.process, ledger, options)
            return
        for step in options.again:
            ledger.forget(step)
        for step in options.only or STEPS:
            run(step, ledger, options, folder, start + options.seconds - GRACE)
            _tell(step, ledger, time.monotonic() - start)
        ledger.compact()
    rows = ledger.rows()
    if any(row.get("level") for row in rows):
        import report

        print(report.tables(report.from_rows(rows)))


def _tell(step: str, ledger: Ledger, seconds: float) -> None:
    rows = [row for row in ledger.rows() if row["step"] == step]
    failed = [row for row in rows if "error" in row]
    print(f"{step}: {len(rows)} rows, {len(failed)} failed, after {seconds:.0f} s", flush=True)
    for row in failed[:20]:
        print(f"    {row['name']}: {row['error'].strip().splitlines()[-1][:200]}", flush=True)


if __name__ == "__main__":
    main()
