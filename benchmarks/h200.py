"""Everything that only a GPU can tell, in ten minutes: tests, figures, and one result file.

    pip install --no-build-isolation --no-deps -e .
    python benchmarks/h200.py
    python benchmarks/h200.py --only gpu-tests --only operator --minutes 4

Steps are processes of their own with a time limit each: one that fails or is stopped costs nobody
else's figures. The result is written anew after every step, with how each of them ended.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report

from i2am.attribution.storage import write_atomically

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
GRACE = 20  # s that a stopped step has to write what it has measured
TAIL = 4000  # characters kept of a step's output


@dataclass(frozen=True)
class Step:
    """A process: what it runs, for how many seconds at most, and whether it writes figures."""

    command: tuple[str, ...]
    limit: int
    writes: bool = True


def benchmark(level: str, *options: str) -> tuple[str, ...]:
    return ("-m", "pytest", str(HERE / f"test_{level}.py"), "--benchmark-only", "-q", *options)


OURS = ("-k", "not flash")
PACKAGES = ("-k", "flash")
# most wanted first; other people's kernels apart, for a wrong access ends a process
STEPS = {
    "gpu-tests": Step(
        ("-m", "pytest", "tests/kernels", "tests/adapters", "-m", "gpu", "-q"), 100, writes=False
    ),
    "operator": Step(benchmark("operator", "--shapes", "512x384", *OURS), 100),
    "unet": Step(benchmark("unet_step", "--unet", "sd15", "--rounds", "9"), 120),
    "operator-large": Step(benchmark("operator", "--shapes", "1024x768", *OURS), 80),
    "packages": Step(benchmark("operator", "--shapes", "512x384", *PACKAGES), 40),
    "budgets": Step((str(HERE / "budgets.py"),), 120),
    "operator-other": Step(
        benchmark("operator", "--shapes", "sdxl", "--shapes", "dit", "--rounds", "7", *OURS), 60
    ),
    "run": Step(benchmark("run", "--rounds", "2"), 90),
    "unet-sdxl": Step(
        benchmark("unet_step", "--unet", "sdxl", "--batch", "1", "--batch", "8", "--rounds", "7"),
        90,
    ),
    "ahead-of-time": Step(
        ("-m", "i2am.kernels.fused.ahead_of_time", "--target", "sm_90"), 60, writes=False
    ),
}


def run(name: str, step: Step, folder: Path, limit: float) -> dict[str, Any]:
    """Run one step; what became of it, and the end of what it said."""
    out, log = folder / f"{name}.json", folder / f"{name}.log"
    out.unlink(missing_ok=True)
    command = [sys.executable, *step.command]
    if step.writes:
        command += [f"--benchmark-json={out}" if "pytest" in command else str(out)]
    start = time.monotonic()
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, env=environment()
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            # pytest writes what it has on an interrupt
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    took = time.monotonic() - start
    return {
        "step": name,
        "status": process.returncode,
        "stopped": took >= limit,
        "seconds": round(took, 1),
        "output": log.read_text(encoding="utf-8", errors="replace")[-TAIL:],
    }


def collect(folder: Path, steps: list[dict[str, Any]], commit: str | None) -> dict[str, Any]:
    """The result so far."""
    sources = []
    for step in steps:
        # missing, empty or half written where the step was killed
        with suppress(OSError, json.JSONDecodeError):
            file = folder / f"{step['step']}.json"
            sources.append(json.loads(file.read_text(encoding="utf-8")))
    result = report.summarize(sources)
    if commit:
        result["commit"] = commit
    return result | {"steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=HERE / "results" / "h200.json")
    parser.add_argument("--raw", type=Path, default=ROOT / ".benchmarks" / "h200")
    parser.add_argument("--only", choices=STEPS, action="append", help="these steps")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of them")
    parser.add_argument("--commit", help="where this is no checkout")
    options = parser.parse_args()
    # a shell may have us ignore interrupts, and the steps would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    options.raw.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    steps: list[dict[str, Any]] = []
    for name in options.only or STEPS:
        limit = min(STEPS[name].limit, end - time.monotonic() - GRACE)
        if limit > 0:
            steps.append(run(name, STEPS[name], options.raw, limit))
        else:
            late = {"status": None, "stopped": True, "seconds": 0.0, "output": "no time was left"}
            steps.append({"step": name, **late})
        last = steps[-1]["output"].strip().rpartition("\n")[2]
        print(f"{name}: {steps[-1]['status']} in {steps[-1]['seconds']} s; {last}", flush=True)
        result = collect(options.raw, steps, options.commit)
        write_atomically(options.out, (json.dumps(result, indent=1) + "\n").encode())
    if result.get("device"):
        print(report.tables(result))


def environment() -> dict[str, str]:
    # the checkout first, as it may not be installed there
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


if __name__ == "__main__":
    main()
