"""How many samples fit a GPU of 12, 24 or 80 GB, with and without recording.

    python benchmarks/budgets.py .benchmarks/budgets.json --budget 12 --budget 24

One guided step of a UNet of SD-1.5 size (latent 64 x 48, 1037 reference tokens) counts, its weights
and everything else that the process holds on the card included. The allocator is held to the budget
and says itself what fits. Writes what is known after every batch that was tried.
"""

import argparse
import gc
import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import eager
import harness
import torch
from diffusers import UNet2DConditionModel
from unets import SIZES, Loop

import i2am
from i2am.attribution.storage import write_atomically

GIB = 2**30
BUDGETS = (12, 24, 80)
BATCHES = (1, 2, 4, 8, 16, 32)
WAYS = ("plain", "beside", "fused", "materialised")
PRECISION = 50
"""A largest batch is known to one part of so many."""
MAX_BATCH = 4096


def largest(fits: Callable[[int], bool], guess: int, *, precision: int = PRECISION) -> int:
    """The largest batch that fits, 0 if none does, not more than a ``1 / precision`` too small.

    Args:
        fits: Whether a batch does; if one does, so do all smaller ones.
        guess: Where to look first.
        precision: How exact, see above.
    """
    low, high = 0, MAX_BATCH + 1
    candidate = min(max(guess, 1), MAX_BATCH)
    stride = max(1, candidate // 16)
    while high - low > max(1, low // precision):
        if fits(candidate):
            low = candidate
            candidate = min(low + stride, (low + high) // 2)
        else:
            high = candidate
            candidate = max(high - stride, (low + high) // 2)
        stride *= 2
    return low


def guess(peaks: dict[int, float], budget: float) -> int:
    """The batch whose peak reaches ``budget``, on the line through the two largest batches."""
    if len(peaks) < 2:
        return 1
    (batch, peak), (larger, larger_peak) = sorted(peaks.items())[-2:]
    per_sample = (larger_peak - peak) / (larger - batch)
    return int(larger + (budget - larger_peak) / max(per_sample, 1.0))


def step_peak(unet: UNet2DConditionModel, batch: int, way: str) -> int:
    """Bytes allocated at most during the first guided step of a run.

    Raises:
        torch.OutOfMemoryError: It does not fit.
    """
    loop = Loop(unet, SIZES["sd15"], batch, guidance=True)
    if way in ("beside", "fused"):
        layout = SIZES["sd15"].layout
        recorder = i2am.record(unet, scheduler=loop.scheduler, layout=layout, attach=way)
        recorder.attach()
        remove = recorder.detach
    elif way == "materialised":
        remove = eager.hook_materialised(unet, loop.conditional)
    else:
        remove = _nothing
    torch.cuda.reset_peak_memory_stats()
    try:
        loop()
        torch.cuda.synchronize()
    finally:
        remove()
    return torch.cuda.max_memory_allocated()


class Tries:
    """Batches that are tried one way, written down as they come."""

    def __init__(self, way: str, unet: UNet2DConditionModel, write: Callable[[str, Any], None]):
        self._way = way
        self._unet = unet
        self._write = write
        self.peaks: dict[int, float] = {}

    def measure(self, batch: int) -> None:
        """Run a step of it.

        Raises:
            torch.OutOfMemoryError: It does not fit.
        """
        gc.collect()
        torch.cuda.empty_cache()
        self.peaks[batch] = step_peak(self._unet, batch, self._way)
        peak = round(self.peaks[batch] / GIB, 3)
        self._write("peaks", {"way": self._way, "batch": batch, "peak_GiB": peak})

    def fits(self, batch: int, budget: int) -> bool:
        """Whether it does on a card of ``budget`` GB."""
        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        # CUDA's own context is on the card too, though not in the allocator's books
        context = total - free - torch.cuda.memory_reserved()
        torch.cuda.set_per_process_memory_fraction((budget * 1e9 - context) / total)
        try:
            self.measure(batch)
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return True

    def largest(self, budget: int) -> int:
        """The largest batch that fits a card of ``budget`` GB."""
        found = largest(partial(self.fits, budget=budget), guess(self.peaks, budget * 1e9))
        self._write("largest", {"way": self._way, "budget_GB": budget, "batch": found})
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--budget", type=int, action="append", help="in GB; default 12, 24, 80")
    parser.add_argument("--way", choices=WAYS, action="append")
    options = parser.parse_args()
    device = torch.device("cuda")
    result: dict[str, Any] = {"about": harness.describe(device), "peaks": [], "largest": []}

    def write(table: str, row: dict[str, Any]) -> None:
        print(row, flush=True)
        result[table].append(row)
        write_atomically(options.out, (json.dumps(result, indent=1) + "\n").encode())

    unet = SIZES["sd15"].build(device, torch.bfloat16)
    total = torch.cuda.get_device_properties(device).total_memory
    budgets = [budget for budget in options.budget or BUDGETS if budget * 1e9 <= total]
    all_tries = [Tries(way, unet, write) for way in options.way or WAYS]
    for tries in all_tries:
        with suppress(torch.OutOfMemoryError):
            for batch in BATCHES:
                tries.measure(batch)
    # small ones first, which are quick: of all ways, should time run out
    for budget in sorted(budgets):
        for tries in all_tries:
            tries.largest(budget)


def _nothing() -> None:
    pass


if __name__ == "__main__":
    main()
