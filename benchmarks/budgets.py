"""How many samples fit a GPU of 12, 24 or 80 GB, with and without recording.

One guided step of a UNet of SD-1.5 size (latent 64 x 48, 1037 reference tokens) counts, its weights
and everything else that the process holds on the card included. The allocator is held to the budget
and says itself what fits. ``gpu.py`` runs it.
"""

import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import eager
import torch
from harness import LeftOut, Settings
from unets import SIZES, Loop

import i2am

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

GIB = 2**30
BUDGETS = (12, 24, 80)
BATCHES = (1, 8, 32)
WAYS = ("plain", "beside", "fused", "materialised")
PRECISION = 20
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


def step_peak(unet: "UNet2DConditionModel", batch: int, way: str) -> int:
    """Bytes allocated at most during the first guided step of a run.

    Raises:
        torch.OutOfMemoryError: It does not fit.
    """
    loop = Loop(unet, SIZES["sd15"], batch, guidance=True)
    recorder = None
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
        peak = torch.cuda.max_memory_allocated()
        if recorder is not None:
            recorder.maps()  # raises what ended the recording: the step itself went on
    finally:
        remove()
    return peak


def fits(unet: "UNet2DConditionModel", way: str, batch: int, budget: float) -> int | None:
    """Peak bytes of a batch on a card of ``budget`` bytes, ``None`` where it does not fit."""
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    # CUDA's own context is on the card too, though not in the allocator's books
    context = total - free - torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (budget - context) / total))
    try:
        return step_peak(unet, batch, way)
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


class Search:
    """Batches of a UNet that are tried in one way; what was learnt of one serves the next.

    Args:
        unet: The denoiser.
        way: How it is recorded, one of ``WAYS``.
    """

    def __init__(self, unet: "UNet2DConditionModel", way: str) -> None:
        self._unet = unet
        self._way = way
        self._peaks: dict[int, float] = {}

    def peaks(self) -> dict[str, Any]:
        """Peaks in GiB of the batches in ``BATCHES``, as long as they fit."""
        _, total = torch.cuda.mem_get_info()
        for batch in BATCHES:
            if not self._fits(batch, total):
                break
        rows = [
            {"way": self._way, "batch": batch, "peak_GiB": round(peak / GIB, 3)}
            for batch, peak in sorted(self._peaks.items())
        ]
        return {"peaks": rows}

    def largest(self, budget_GB: int) -> dict[str, Any]:
        """The largest batch on a card of so many GB.

        Raises:
            LeftOut: The card here is smaller.
        """
        budget = budget_GB * 1e9
        if budget > torch.cuda.get_device_properties().total_memory:
            raise LeftOut(f"this card has less than {budget_GB} GB")
        found = largest(partial(self._fits, budget=budget), guess(self._peaks, budget))
        return {"largest": [{"way": self._way, "budget_GB": budget_GB, "batch": found}]}

    def _fits(self, batch: int, budget: float) -> bool:
        peak = fits(self._unet, self._way, batch, budget)
        if peak is not None:
            self._peaks[batch] = peak
        return peak is not None


def rows(settings: Settings) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Names of the rows, and what measures each: small budgets first, which are quick.

    Raises:
        LeftOut: There is no GPU.
    """
    if not settings.on_gpu:
        raise LeftOut("only a GPU's allocator can be held to a budget")
    unet = SIZES["sd15"].build(settings.device, torch.bfloat16)
    searches = {way: Search(unet, way) for way in WAYS}
    for way, search in searches.items():
        yield f"peaks, {way}", search.peaks
    for budget in BUDGETS:
        for way, search in searches.items():
            yield f"{budget} GB, {way}", partial(search.largest, budget)


def _nothing() -> None:
    pass
