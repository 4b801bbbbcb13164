"""One denoising step of a whole UNet, recorded and not: all cross-attentions, both directions.

860 M (SD 1.5) or 2.6 G (SDXL) random weights, 1037 reference tokens. Two UNets share the weights:
one is plain, the other recorded all the time, and their steps alternate. On a CPU ``recording_s``
is the median time spent inside the recorder, which a noisy machine blurs less than the ratio. The
hooks that form both softmaxes stand for published code: ``materialised`` at its best,
``published`` with all that it computes once more.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import eager
import torch
from harness import MIB, LeftOut, Settings, compare
from torch import Tensor
from unets import SIZES, STEPS, GraphedLoop, Loop, twin

import i2am
from i2am.adapters.attention.sites import LISTENERS

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

HOOKS = {"materialised": eager.hook_materialised, "published": eager.hook_published}
WAYS = ("beside", "fused", *HOOKS)
ROUNDS_ON_CPU = {"beside": 5, "fused": 5, "materialised": 2, "published": 2}


def measure(
    benchmark: Any, settings: Settings, size: str, batch: int, way: str, guidance: bool
) -> None:
    """Measure one way of recording a step into ``benchmark``."""
    unet, other = _twins(size, settings)
    plain = Loop(unet, SIZES[size], batch, guidance=guidance)
    loop = Loop(other, SIZES[size], batch, guidance=guidance)
    benchmark.group = f"{size}, batch {batch}{', guidance' * guidance}"
    _describe(benchmark, settings, "step", size, batch, way, guidance)
    rounds = None if settings.on_gpu else min(settings.rounds, ROUNDS_ON_CPU[way])
    if way in HOOKS:
        remove = HOOKS[way](other, loop.conditional)
        try:
            compare(benchmark, loop, plain, settings, rounds=rounds, repeat=False)
        finally:
            remove()
        return
    layout = SIZES[size].layout
    with i2am.record(other, scheduler=loop.scheduler, layout=layout, attach=way) as recorder:
        # the first step of a run tells samples from guidance parts: it records all rows
        same = torch.equal(loop(), plain())
        inside: list[float] = []
        step = loop if settings.on_gpu else _time_listeners(loop, inside)
        compare(benchmark, step, plain, settings, rounds=rounds, repeat=False)
        maps = recorder.maps()
    assert maps.n_samples == batch
    kept = sum(
        sums.nbytes
        for layer in maps.layer_sums
        for sums in (layer.reference_to_generated, layer.generated_to_reference)
    )
    benchmark.extra_info.update(kept_MiB_per_sample=kept / batch / MIB, identical=same)
    if inside:
        benchmark.extra_info["recording_s"] = statistics.median(inside)
    assert same or way == "fused"


def measure_graph(benchmark: Any, settings: Settings, size: str, batch: int) -> None:
    """Guided steps replayed from a CUDA graph, with recording in it, against one without.

    Raises:
        LeftOut: There is no GPU.
    """
    if not settings.on_gpu:
        raise LeftOut("CUDA graphs need a GPU")
    plain, loop = (
        GraphedLoop(unet, SIZES[size], batch, guidance=True) for unet in _twins(size, settings)
    )
    _measure_variant(benchmark, settings, size, batch, plain, loop, "graph", tolerance=0.0)


def measure_compiled(benchmark: Any, settings: Settings, size: str, batch: int) -> None:
    """Guided steps of a UNet compiled block by block, recorded, against one that is not.

    Recorded attention is an operator that the compiler cannot look into, so it joins other
    operations than beside plain attention: outputs are equal to rounding only.
    """
    unets = _twins(size, settings)
    plain, loop = (Loop(unet, SIZES[size], batch, guidance=True) for unet in unets)
    for unet in unets:
        # inductor needs a compiler where there is no GPU
        backend = "inductor" if settings.on_gpu else "aot_eager"
        unet.compile_repeated_blocks(fullgraph=True, backend=backend)
    try:
        # a few roundings of bf16, 2 ** -8 each
        _measure_variant(benchmark, settings, size, batch, plain, loop, "compiled", tolerance=2**-5)
    finally:
        _twins.cache_clear()


def _measure_variant(
    benchmark: Any,
    settings: Settings,
    size: str,
    batch: int,
    plain: Loop,
    loop: Loop,
    name: str,
    *,
    tolerance: float,
) -> None:
    benchmark.group = f"{size}, batch {batch}, guidance, {name}"
    _describe(benchmark, settings, "variant", size, batch, name, True)
    layout = SIZES[size].layout
    with i2am.record(loop.unet, scheduler=loop.scheduler, layout=layout) as recorder:
        differences = [_difference(loop(), plain()) for _ in range(4)]
        rounds = min(settings.rounds, STEPS - len(differences) - 4)  # of one run
        compare(benchmark, loop, plain, settings, rounds=rounds, repeat=False)
        evaluations = recorder.maps().provenance["evaluations"]
    difference = max(differences)
    benchmark.extra_info.update(difference=difference, evaluations=evaluations)
    assert difference <= tolerance, f"the recorded step is {difference:.2g} off the un-recorded one"


def _describe(
    benchmark: Any, settings: Settings, level: str, size: str, batch: int, way: str, guidance: bool
) -> None:
    benchmark.extra_info.update(
        level=level,
        size=size,
        batch=batch,
        guidance=guidance,
        way=way,
        attends=True,
        ours=way not in HOOKS,
        dtype=str(settings.dtype).removeprefix("torch."),
    )


def _difference(output: Tensor, plain: Tensor) -> float:
    """The largest difference as a part of the largest value; a NaN is infinitely far."""
    difference = (output - plain).abs().max() / plain.abs().max()
    return float(difference.nan_to_num(float("inf")))


@functools.lru_cache(maxsize=1)
def _twins(size: str, settings: Settings) -> "tuple[UNet2DConditionModel, UNet2DConditionModel]":
    unet = SIZES[size].build(settings.device, settings.dtype)
    return unet, twin(unet)


def _time_listeners(loop: Loop, inside: list[float]) -> Callable[[], None]:
    """A step that appends to ``inside`` what the attached recorder takes of it."""
    ((number, listener),) = LISTENERS.items()

    def timed(*call: Any) -> None:
        start = time.perf_counter()
        listener(*call)
        inside[-1] += time.perf_counter() - start

    def step() -> None:
        inside.append(0.0)
        loop()

    LISTENERS[number] = timed
    return step
