"""How much memory a batch takes, measured on a short run, and the largest batch for a budget."""

import time
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

import i2am
from i2am.memory import peak_bytes

if TYPE_CHECKING:
    from i2am.evaluation.opening import Opened


class Measured(NamedTuple):
    """Of a short run of one batch."""

    bytes: int
    """The most that was in use at once: weights, activations and sums."""
    seconds: float
    """Of one denoising step with its part of the rest."""
    map_bytes: int
    """Of what a shard stores of one sample's maps."""


class Need(NamedTuple):
    """Memory in bytes as a line over the batch: ``fixed + batch * per_sample``."""

    fixed: int
    per_sample: int

    def of(self, batch: int) -> int:
        """What a batch takes."""
        return self.fixed + batch * self.per_sample

    def largest(self, budget: int) -> int:
        """The largest batch in a budget, 0 where one sample does not fit."""
        return max(0, (budget - self.fixed) // max(self.per_sample, 1))


def measure(opened: "Opened", batch: int) -> Measured:
    """Runs a few steps of a batch: copies of the first sample that can be read.

    Raises:
        ImageRejected: No sample can be read.
        OutOfMemory: The batch does not fit.
    """
    from i2am.evaluation.generating import first_whole, generate
    from i2am.evaluation.kept import kept_maps

    settings = opened.settings
    steps = max(2, settings.time_groups)
    settings = replace(settings, steps=steps, batch=batch, shard=max(batch, settings.shard))
    item = first_whole(opened.data[settings.pairs[0]])
    items = {name: value.expand(batch, *value.shape) for name, value in item.items()}
    opened.pipe.set_progress_bar_config(disable=True)
    torch.set_num_threads(settings.threads)

    def call() -> i2am.AttributionMaps:
        return generate(opened.pipe, items, [0] * batch, settings)[1]

    if settings.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    maps = call()
    seconds = (time.monotonic() - started) / steps
    stored = {}
    if settings.maps != "none":
        stored = kept_maps(maps, getattr(torch, settings.maps))
    map_bytes = sum(tensor.nbytes for tensor in stored.values()) // batch
    del maps, stored
    if settings.device == "cuda":
        return Measured(torch.cuda.max_memory_allocated(), seconds, map_bytes)
    weights = sum(
        tensor.nbytes
        for module in opened.pipe.components.values()
        if isinstance(module, torch.nn.Module)
        for tensor in module.state_dict().values()
    )
    return Measured(weights + peak_bytes(call), seconds, map_bytes)


def need(opened: "Opened") -> Need:
    """Memory over the batch, from a batch of one and of two."""
    one, two = (measure(opened, batch).bytes for batch in (1, 2))
    return Need(2 * one - two, two - one)
