"""How everything here is measured, on a CPU as on a GPU: in turns, with the memory beside the time.

A row is one way of doing something. Each of its rounds comes right after a round of the plain way,
so that a busy machine slows both; ``ratio`` is the median quotient of such neighbours. A round
repeats short calls, without waiting in between, and waits for the device once at its end: on a GPU
that is the larger of what the kernels and what Python takes. ``kernels_ms`` is the former alone.
"""

import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from i2am.testing import peak_bytes

Call = Callable[[], Any]

ROUND = 0.01  # s that the repeated calls of a round take together
MAX_CALLS = 1000
GRAPHED_CALLS = 20
MIB = 2**20
PACKAGES = ("torch", "triton", "diffusers", "transformers", "flash-colreduce", "flash-colsum")


class LeftOut(Exception):
    """A row that this machine does not have, and why."""


@dataclass(frozen=True)
class Settings:
    """What the options of the command line, or the device, decide."""

    device: torch.device
    dtype: torch.dtype
    batches: tuple[int, ...]
    """Samples of a denoising step."""
    rounds: int
    steps: int
    """Of a whole run."""
    impl: str | None = None
    """Of the kernels; ``None`` is the device's default."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def batch(self) -> int:
        """Samples of a single call: 8 if that is one of the batches."""
        return 8 if 8 in self.batches else self.batches[0]


class Row:
    """A row measured by a script: the part of pytest-benchmark's fixture that `compare` needs."""

    def __init__(self) -> None:
        self.group = ""
        self.extra_info: dict[str, Any] = {}
        self._seconds: list[float] = []

    def pedantic(self, call: Call, *, setup: Call, rounds: int = 1, warmup_rounds: int = 0) -> None:
        """Run ``setup`` and then ``call``, timed, ``rounds`` times after ``warmup_rounds``."""
        for _ in range(warmup_rounds):
            setup()
            call()
        for _ in range(rounds):
            setup()
            start = time.perf_counter()
            call()
            self._seconds.append(time.perf_counter() - start)

    def result(self) -> dict[str, Any]:
        """The row as a file of results holds it: what was measured and its percentiles in ms."""
        return row(self.group, self.extra_info, self._seconds)


def row(group: str, info: Mapping[str, Any], seconds: Sequence[float]) -> dict[str, Any]:
    """A row of results from the seconds of its rounds, each of ``info["calls"]`` calls."""
    times = 1e3 * np.percentile(seconds, (20, 50, 80)) / info["calls"]
    percentiles = dict(zip(("p20_ms", "p50_ms", "p80_ms"), map(_short, times), strict=True))
    return {"group": group, **info, **percentiles}


def compare(
    benchmark: Any,
    work: Call,
    plain: Call,
    settings: Settings,
    *,
    rounds: int | None = None,
    repeat: bool = True,
) -> None:
    """Time ``work`` as this test's row, in turns with ``plain``, then the memory of both.

    Stats of the row are seconds per round of ``extra_info["calls"]`` calls.

    Args:
        benchmark: The fixture of pytest-benchmark, or a :class:`Row`.
        work: What the row is about.
        plain: What it is compared with.
        settings: Where, and how often.
        rounds: Instead of the settings'.
        repeat: Whether a round may be several calls; one call takes seconds where it may not.
    """
    device = settings.device
    rounds = rounds or settings.rounds
    calls, plain_calls = (repetitions(call, device) if repeat else 1 for call in (work, plain))
    before: list[float] = []
    after: list[float] = []
    benchmark.pedantic(
        lambda: after.append(seconds(work, calls, device)),
        setup=lambda: before.append(seconds(plain, plain_calls, device)),
        rounds=rounds,
        warmup_rounds=int(not repeat),
    )
    before, after = before[-rounds:], after[-rounds:]
    quotients = [a / b for b, a in zip(before, after, strict=True)]
    low, ratio, high = np.percentile(quotients, (20, 50, 80))
    benchmark.extra_info.update(
        calls=calls,
        plain_ms=_short(1e3 * float(np.median(before))),
        ratio=_short(ratio),
        ratio_p20=_short(low),
        ratio_p80=_short(high),
        memory_MiB=_short(extra_bytes(work, device) / MIB),
        plain_memory_MiB=_short(extra_bytes(plain, device) / MIB),
    )


def seconds(call: Call, calls: int, device: torch.device) -> float:
    """Per call, of ``calls`` that follow each other without waiting."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def repetitions(call: Call, device: torch.device) -> int:
    """How many calls make a round; warms up on the way."""
    seconds(call, 1, device)
    return max(1, min(MAX_CALLS, round(ROUND / seconds(call, 1, device))))


def kernels_ms(call: Call, device: torch.device) -> float | None:
    """Milliseconds on the device of a call replayed as a CUDA graph, with no Python in between.

    ``None`` on a CPU, or where the call cannot be captured. Call it last: capturing that goes wrong
    may leave the device in disorder.
    """
    if device.type != "cuda":
        return None
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(GRAPHED_CALLS):
                call()
    except RuntimeError as error:
        print(f"cannot be captured: {error}")
        return None
    rounds = repetitions(graph.replay, device)
    return _short(1e3 * seconds(graph.replay, rounds, device) / GRAPHED_CALLS)


def extra_bytes(call: Call, device: torch.device) -> int:
    """The most that a call holds at once beside its inputs and what it returns.

    Call it on what ran before: what is made once and kept, a workspace say, is not the call's. Of a
    CPU's memory what PyTorch's allocator hands out counts; libraries' own is not seen.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        results: list[Any] = []
        peak = peak_bytes(lambda: results.append(call()))
        result = results[0]
    return max(0, peak - sum(tensor.nbytes for tensor in _tensors(result)))


def synchronize(device: torch.device) -> None:
    """Wait for everything that was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def is_lost() -> bool:
    """Whether an illegal access, say, has ended this process's use of the GPU."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def describe(device: torch.device) -> dict[str, Any]:
    """The machine and the versions that a figure belongs to."""
    about: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": {package: found for package in PACKAGES if (found := _version(package))},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "device": properties.name,
            "memory_GiB": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return about


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _tensors(result: Any) -> Iterable[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [part for part in result or () if isinstance(part, Tensor)]


def _short(number: float) -> float:
    return float(f"{number:.4g}")
