"""One attention call: as it is, recorded, and its maps formed in full.

Every group of rows is one shape. What the ways are compared with is un-recorded attention by the
best backend of this device. ``fused`` and both kinds of ``attention`` attend themselves; all others
run beside the model's own call, so that recording costs 1 + their ratio. Inputs stay where they
are from call to call, in a GPU's second cache if they fit: as fresh projections in a model.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import eager
import roofline
import torch
import torch.nn.functional as F
from harness import Call, LeftOut, Settings, compare, kernels_ms, seconds
from shapes import AttentionShape
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from i2am.kernels import Probe, accumulate, attention, attention_statistics
from i2am.kernels.native import attention_with_lse
from i2am.testing import assert_matches_reference, make_qkv

BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)


class Inputs(NamedTuple):
    """One call, and the accumulators of its maps."""

    query: Tensor
    key: Tensor
    value: Tensor
    r2g: Tensor
    g2r: Tensor
    impl: str | None

    def record(self, query_lse: Tensor | None = None) -> None:
        probes = uniform_probes(self.r2g, self.g2r)
        accumulate(self.query, self.key, probes, normaliser=query_lse, impl=self.impl)

    def attend(self) -> tuple[Tensor, Tensor]:
        return attention(self.query, self.key, self.value, impl=self.impl)


def uniform_probes(r2g: Tensor, g2r: Tensor) -> list[Probe]:
    """Both maps of a call: every key has one vote, and every query counts alike."""
    votes, rows = (sums.new_full((1, 1, sums.shape[-1]), 1 / sums.shape[-1]) for sums in (g2r, r2g))
    return [Probe("keys", g2r, left=rows), Probe("queries", r2g, right=votes)]


def plain(of: Inputs) -> Call:
    return lambda: F.scaled_dot_product_attention(of.query, of.key, of.value)


def with_lse(of: Inputs) -> Call:
    if attention_with_lse(of.query, of.key, of.value) is None:
        raise LeftOut("the backend that PyTorch takes here hands over no log-sum-exp")
    return lambda: attention_with_lse(of.query, of.key, of.value)


def beside(of: Inputs) -> Call:
    return of.record


def beside_with_lse(of: Inputs) -> Call:
    _, lse = of.attend()
    return lambda: of.record(lse)


def fused(of: Inputs) -> Call:
    def call() -> Tensor:
        output, lse = of.attend()
        of.record(lse)
        return output

    return call


def by(maps: Callable[[Tensor, Tensor], eager.Maps], of: Inputs) -> Call:
    return lambda: maps(of.query, of.key)


def package(name: str, of: Inputs) -> Call:
    if find_spec(name) is None:
        raise LeftOut(f"{name} is not installed")
    if of.query.device.type != "cuda":
        raise LeftOut(f"{name} needs a GPU")
    if name == "flash_colsum" and of.query.shape != of.key.shape:
        raise LeftOut("flash_colsum needs as many keys as queries")
    return by(getattr(eager, name), of)


WAYS: dict[str, Callable[[Inputs], Call]] = {
    "attention": plain,
    "attention, with lse": with_lse,
    "beside": beside,
    "beside, given lse": beside_with_lse,
    "fused": fused,
    "materialised": functools.partial(by, eager.materialised),
    "chunked": functools.partial(by, eager.chunked),
    "flash-colreduce": functools.partial(package, "flash_colreduce"),
    "flash-colsum": functools.partial(package, "flash_colsum"),
}
ATTENDING = ("attention", "attention, with lse", "fused")
OURS = ("beside", "beside, given lse", "fused")


def measure(benchmark: Any, settings: Settings, shape: AttentionShape, way: str) -> None:
    """Measure one way of one shape into ``benchmark``.

    Raises:
        LeftOut: The way does not exist on this device.
        AssertionError: Its maps are further from the fp64 reference than they may be.
    """
    of = make_inputs(shape, settings)
    benchmark.group = str(shape)
    benchmark.extra_info.update(
        level="operator",
        way=way,
        attends=way in ATTENDING,
        ours=way in OURS,
        shape=str(shape),
        heads=shape.heads,
        seqlen_q=shape.seqlen_q,
        seqlen_k=shape.seqlen_k,
        head_dim=shape.head_dim,
        calls_per_evaluation=shape.calls,
        batch=settings.batch,
        dtype=str(of.query.dtype).removeprefix("torch."),
    )
    call = WAYS[way](of)
    backend, best = best_attention(shape, settings)
    compare(benchmark, call, best, settings)
    benchmark.extra_info["plain"] = backend
    if way in OURS:
        # no speed is reported for a wrong result
        for sums in (of.r2g, of.g2r):
            sums.zero_()
        call()
        _check(of, benchmark.extra_info)
    if settings.on_gpu:
        if way in OURS:
            benchmark.extra_info["floor_ms"] = 1e3 * _floor(shape, settings.batch, way)
        if way in ("attention", *OURS, "flash-colreduce"):
            benchmark.extra_info["plain_kernels_ms"] = kernels_ms(best, settings.device)
            benchmark.extra_info["kernels_ms"] = kernels_ms(call, settings.device)


@functools.lru_cache(maxsize=1)
def make_inputs(shape: AttentionShape, settings: Settings) -> Inputs:
    """The same for all ways, which follow each other."""
    query, key, value = make_qkv(
        settings.batch,
        shape.heads,
        shape.seqlen_q,
        shape.seqlen_k,
        shape.head_dim,
        dtype=settings.dtype,
        device=settings.device,
    )
    r2g, g2r = (
        tokens.new_zeros(*tokens.shape[:2], 1, tokens.shape[2], dtype=torch.float32)
        for tokens in (query, key)
    )
    return Inputs(query, key, value, r2g, g2r, settings.impl)


def best_attention(shape: AttentionShape, settings: Settings) -> tuple[str, Call]:
    """The fastest backend of ``scaled_dot_product_attention``, by name, and a call of it."""
    call = plain(make_inputs(shape, settings))
    if not settings.on_gpu:
        return "default", call
    backend = _best_backend(shape, settings)

    def attend() -> Tensor:
        with sdpa_kernel(backend):
            return call()

    return backend.name.lower(), attend


@functools.lru_cache(maxsize=1)
def _best_backend(shape: AttentionShape, settings: Settings) -> SDPBackend:
    call = plain(make_inputs(shape, settings))
    times: dict[SDPBackend, float] = {}
    for backend in BACKENDS:
        if backend is SDPBackend.MATH and times:
            continue  # materialises, never the best
        try:
            with sdpa_kernel(backend):
                seconds(call, 3, settings.device)
                times[backend] = seconds(call, 20, settings.device)
        except RuntimeError:  # does not take these inputs
            continue
    return min(times, key=times.__getitem__)


def _floor(shape: AttentionShape, batch: int, way: str) -> float:
    recording = roofline.recording(shape, batch, lse_known=way != "beside").floor
    return recording + roofline.attention(shape, batch).floor * (way in ATTENDING)


def _check(of: Inputs, info: dict[str, Any]) -> None:
    few = slice(0, 1)  # one head of one sample: the fp64 matrix of all would take gigabytes
    query, key = of.query[few, few], of.key[few, few]
    exact = attention_statistics(query.double(), key.double(), impl="reference")
    rough = attention_statistics(query, key, impl="reference")
    try:
        for name, sums in (("r2g", of.r2g[few, few, 0]), ("g2r", of.g2r[few, few])):
            assert_matches_reference(
                sums, exact=getattr(exact, name), eager=getattr(rough, name), name=name
            )
    except AssertionError as error:
        info["wrong"] = str(error)  # the row of a report says so instead of its speed
        raise
