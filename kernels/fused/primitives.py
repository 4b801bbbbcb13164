"""Small helpers the kernels share: launches, tiles, scores, exponentials.

Scores stay natural and meet log2(e) only after a log-sum-exp is taken from them: scaled before, a
logit of 200 would be rounded at 288, and a mask of ``finfo.min`` would overflow to -inf.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# ptxas 12.8 (Triton 3.6 and 3.7) computes descriptors of shared memory for Hopper's matrix
# instructions from registers that nothing has written, where two tiles of the same width take turns
# in the same place: in code without a loop over tokens, which Triton makes of a count known to be
# 1, and in loops whose loads no pipeline fetches ahead. So a count of 1 is no constant
# (`keeping_loops`), and features that are read one by one lie in one block (``configs.width``).
# ``ahead_of_time`` looks for such registers.
INTERPRETED = bool(triton.knobs.runtime.interpret)

_INTERPRETED = tl.constexpr(INTERPRETED)
_LOG2E = tl.constexpr(1.4426950408889634)
_SHARED_RANGE = tl.constexpr(60.0)
_LN2 = tl.constexpr(0.6931471805599453)


class Launch(NamedTuple):
    """One kernel call with all its arguments: to be run, or compiled for another machine."""

    kernel: Any
    grid: tuple[int]
    arguments: dict[str, Any]

    def run(self, device: torch.device) -> None:
        """Run on ``device``, which need not be the current one."""
        if device.type != "cuda":
            self.kernel[self.grid](**self.arguments)
            return
        with torch.cuda.device(device):
            self.kernel[self.grid](**self.arguments)


def keeping_loops(kernel: Any, *counts: str) -> Any:
    """The kernel for launches in which a count is 1: Triton is told nothing about the counts.

    Otherwise it is worth telling: where 16 divides a count, masks let loads be wide.
    """
    return triton.jit(do_not_specialize=counts)(kernel.fn)


def strides(name: str, tensor: Tensor | None, axes: Sequence[str]) -> dict[str, int]:
    """The kernel arguments ``stride_{name}_{axis}`` of a tensor; 0 for one that is absent."""
    values = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"stride_{name}_{axis}": value for axis, value in zip(axes, values, strict=True)}


def weight_strides(name: str, weights: Tensor | None, axes: Sequence[str]) -> dict[str, int]:
    """As :func:`strides` of ``[batch, rows, tokens]``, with 0 for a batch of one.

    The batch mostly shares its weights, which is a stride of 0 too: a run whose later steps record
    fewer rows than its first goes on with the kernels that it has, not with new ones.
    """
    values = strides(name, weights, axes)
    if weights is not None and weights.shape[0] == 1:
        values[f"stride_{name}_{axes[0]}"] = 0
    return values


def read_together(*features: Tensor) -> bool:
    """Whether 8 features are read at a time, which are 16 bytes in 16 bits, or each by itself.

    Addresses and strides of ``[batch, heads, seqlen, head_dim]`` decide; see `feature_strides`.
    """
    if any(tensor.data_ptr() % 16 or tensor.stride(3) != 1 for tensor in features):
        return False
    steps = [step for tensor in features for step in tensor.stride()[:3]]
    return _unit(steps) == 8 or all(step % 16 == 0 for step in steps)


def feature_strides(**features: tuple[Tensor, str]) -> dict[str, int]:
    """The kernel arguments UNIT and ``stride_{name}_{axis}``, all but the last stride in UNITs.

    Triton learns of a stride only whether 16 divides it. With 40 or 72 features it does not, and
    every load would be of one number, which no pipeline fetches ahead. UNIT is 8 where the strides
    allow it: the compiler then sees that 8 numbers lie together. Otherwise it is 1: where 16
    divides all strides, and beyond 32 bits, which the product would not fit.

    Args:
        features: ``[batch, heads, seqlen, head_dim]`` and the name of its axis of tokens, by name.
    """
    unit = _unit([step for tensor, _ in features.values() for step in tensor.stride()[:3]])
    arguments = {"UNIT": unit}
    for name, (tensor, tokens) in features.items():
        *steps, last = tensor.stride()
        for axis, step in zip(("b", "h", tokens), steps, strict=True):
            arguments[f"stride_{name}_{axis}"] = step // unit
        arguments[f"stride_{name}_d"] = last
    return arguments


def _unit(steps: Sequence[int]) -> int:
    by_8 = all(step % 8 == 0 and step < 2**31 for step in steps)
    return 8 if by_8 and any(step % 16 for step in steps) else 1


@triton.jit
def load_tile(
    base,
    offs_t,
    mask_t,
    stride_t,
    stride_d,
    start,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Features ``start .. start + BLOCK`` of the tokens ``offs_t``; 0 beyond either edge."""
    offs_d = start + tl.arange(0, BLOCK)
    # [tokens, BLOCK]
    offsets = offs_t[:, None].to(tl.int64) * stride_t + offs_d[None, :].to(tl.int64) * stride_d
    return tl.load(base + offsets, mask=mask_t[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def load_features(
    base,
    offs_t,
    mask_t,
    stride_t,
    stride_d,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    """The tokens ``offs_t`` as ``([tokens, BLOCK_D], [tokens, BLOCK_TAIL])``."""
    x = load_tile(base, offs_t, mask_t, stride_t, stride_d, 0, HEAD_DIM, BLOCK_D)
    x_tail = x
    if BLOCK_TAIL > 0:
        x_tail = load_tile(base, offs_t, mask_t, stride_t, stride_d, BLOCK_D, HEAD_DIM, BLOCK_TAIL)
    return x, x_tail


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """``a @ b`` in fp32, plus ``accumulator`` if there is one."""
    if _INTERPRETED and a.dtype == tl.bfloat16:
        # the interpreter would multiply the bit patterns
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)
    else:
        return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 to ``dtype``, to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        # the interpreter truncates: round the bits first
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def score_tile(
    x,
    x_tail,
    x_base,
    offs_x,
    mask_x,
    stride_xt,
    stride_xd,
    y_base,
    offs_y,
    mask_y,
    stride_yt,
    stride_yd,
    bias_base,
    stride_bias_x,
    stride_bias_y,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    """Scores of the tokens ``x`` against the tokens ``y``; -inf beyond the last ``y``.

    Beyond the last ``x`` they are meaningless, and never stored: one mask less in registers.

    ``x`` (and ``x_tail``) hold the features when they fit the two blocks; otherwise both sides are
    read in chunks of BLOCK_D, for fp32, whose dots would keep whole rows in registers.
    """
    # [x, y]
    scores = tl.zeros([offs_x.shape[0], offs_y.shape[0]], tl.float32)
    if BLOCK_D + BLOCK_TAIL < HEAD_DIM:
        for d in range(0, HEAD_DIM, BLOCK_D):
            x = load_tile(x_base, offs_x, mask_x, stride_xt, stride_xd, d, HEAD_DIM, BLOCK_D)
            y = load_tile(y_base, offs_y, mask_y, stride_yt, stride_yd, d, HEAD_DIM, BLOCK_D)
            scores = dot(x, tl.trans(y), scores, "ieee")
    else:
        y = load_tile(y_base, offs_y, mask_y, stride_yt, stride_yd, 0, HEAD_DIM, BLOCK_D)
        scores = dot(x, tl.trans(y), scores, "ieee")
        if BLOCK_TAIL > 0:
            y = load_tile(
                y_base, offs_y, mask_y, stride_yt, stride_yd, BLOCK_D, HEAD_DIM, BLOCK_TAIL
            )
            scores = dot(x_tail, tl.trans(y), scores, "ieee")
    scores *= scale
    if bias_base is not None:
        offs_x64 = offs_x[:, None].to(tl.int64)
        offs_y64 = offs_y[None, :].to(tl.int64)
        bias = tl.load(
            bias_base + offs_x64 * stride_bias_x + offs_y64 * stride_bias_y,
            mask=mask_x[:, None] & mask_y[None, :],
            other=0.0,
        )
        scores += bias.to(tl.float32)
    return tl.where(mask_y[None, :], scores, float("-inf"))


@triton.jit
def exponential(x):
    """``e ** x`` by the hardware's base-2 exponential."""
    return tl.exp2(x * _LOG2E)


@triton.jit
def online_softmax(scores, running_max):
    """A step of an online softmax over axis 1: ``(weights, correction, new running maximum)``."""
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    # rows without a valid score keep a finite pivot: -inf - -inf would be NaN
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    return exponential(scores - pivot[:, None]), exponential(running_max - pivot), new_max


@triton.jit
def compensated_add(total, lost, x):
    """``total + x`` and what rounding took from it so far: ``(total, lost)``, after Kahan."""
    x -= lost
    new_total = total + x
    return new_total, (new_total - total) - x


@triton.jit
def log_sum_exp(running_max, total):
    """What :func:`online_softmax` saw, as a log-sum-exp; -inf where all of it was masked."""
    return running_max + tl.log2(tl.where(total == 0.0, 1.0, total)) * _LN2


@triton.jit
def shares(scores, lse):
    """``exp(scores - lse)``, 0 where a fully masked token has an lse of -inf."""
    # exp(s - inf) is 0 where exp(-inf - -inf) would be NaN
    return exponential(scores - tl.where(lse == float("-inf"), float("inf"), lse))


@triton.jit
def shares_of_rows(scores, over_queries, column_lse, row_lse):
    """``P`` of a tile whose ``C`` is known, where it is safe without an exponential per score.

    ``P = C exp(column_lse - pivot) exp(pivot - row_lse)``: what underflows is below ``e ** -27``
    while the last factor is at most ``e ** 60``.
    """
    pivot = tl.max(column_lse, 0)
    pivot = tl.where(pivot == float("-inf"), 0.0, pivot)
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
    if pivot - tl.min(row_lse, 0) <= _SHARED_RANGE:
        back = exponential(column_lse - pivot)
        over_keys = over_queries * back[None, :] * exponential(pivot - row_lse)[:, None]
    else:
        over_keys = exponential(scores - row_lse[:, None])
    return over_keys


@triton.jit
def weighted_sums(shared, weights_ptr, stride_r, mask, rows, BLOCK_ROWS: tl.constexpr):
    """``sum_y weights[r, y] * shared[x, y]`` as ``[x, BLOCK_ROWS]``; ``weights_ptr`` is ``[y]``."""
    offs_rows = tl.arange(0, BLOCK_ROWS)
    sums = tl.zeros([shared.shape[0], BLOCK_ROWS], tl.float32)
    for r in tl.static_range(BLOCK_ROWS):
        w = tl.load(weights_ptr, mask=mask & (r < rows), other=0.0)
        row = tl.sum(shared * w[None, :], 1)
        sums += tl.where(offs_rows[None, :] == r, row[:, None], 0.0)
        weights_ptr += stride_r
    return sums


@triton.jit
def weighted_tile(
    shared,
    weights_ptr,
    stride_r,
    mask,
    rows,
    BLOCK_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """:func:`weighted_sums`, by a matrix product where there are many rows."""
    if BLOCK_ROWS >= 16:
        offs_rows = tl.arange(0, BLOCK_ROWS)
        w = tl.load(
            weights_ptr[:, None] + offs_rows[None, :].to(tl.int64) * stride_r,
            mask=mask[:, None] & (offs_rows < rows)[None, :],
            other=0.0,
        )
        return dot(shared, w, None, PRECISION)
    else:
        return weighted_sums(shared, weights_ptr, stride_r, mask, rows, BLOCK_ROWS)


@triton.jit
def add_into(sums_ptr, offs_t, mask_t, stride_t, offs_r, mask_r, stride_r, sums):
    """Add ``sums`` ``[tokens, rows]`` to what is at ``sums_ptr``."""
    # [tokens, rows]
    accumulators = (
        sums_ptr + offs_t[:, None].to(tl.int64) * stride_t + offs_r[None, :].to(tl.int64) * stride_r
    )
    mask = mask_t[:, None] & mask_r[None, :]
    tl.store(accumulators, tl.load(accumulators, mask=mask, other=0.0) + sums, mask=mask)
