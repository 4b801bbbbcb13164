"""The specification: materialises the attention matrix and reads like README.md.

Memory is O(seqlen_q * seqlen_k) per head. Runs anywhere and in fp64, where it is the ruler the
other implementations are measured with.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from i2am.kernels.probes import Over, Probe, Side


def _softmax_from_lse(scores: Tensor, lse: Tensor) -> Tensor:
    # a fully masked row or column has lse = -inf and no weight at all: -inf - -inf would be NaN
    return torch.where(lse.isneginf(), 0.0, (scores - lse).exp())


def _scores(query: Tensor, key: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    compute = torch.promote_types(query.dtype, torch.float32)
    scores = scale * (query.to(compute) @ key.to(compute).mT)  # [B, H, M, N]
    return scores if bias is None else scores + bias.to(compute)


def accumulate(
    query: Tensor,
    key: Tensor,
    probes: Sequence[Probe],
    *,
    scale: float,
    bias: Tensor | None,
    normaliser: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Add what the probes read of both softmaxes; returns ``(query_lse, key_lse)``."""
    scores = _scores(query, key, scale, bias)
    query_lse = scores.logsumexp(dim=-1) if normaliser is None else normaliser  # [B, H, M]
    key_lse = scores.logsumexp(dim=-2)  # [B, H, N]
    over_keys = _softmax_from_lse(scores, query_lse[..., None])  # P
    over_queries = _softmax_from_lse(scores, key_lse[..., None, :])  # C
    for probe in probes:
        sums = over_keys if probe.over == Over.KEYS else over_queries
        if probe.left is not None:
            sums = _dense(probe.left, scores.dtype) @ sums
        if probe.right is not None:
            sums = sums @ _dense(probe.right, scores.dtype).mT
        if isinstance(probe.right, Tensor):
            sums = sums.mT
        probe.into.add_(sums if probe.into.ndim == 4 else sums.mean(dim=1))
    return query_lse, key_lse


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Plain attention: ``(output in query.dtype, query_lse)``; a fully masked row gives zeros."""
    scores = _scores(query, key, scale, bias)
    query_lse = scores.logsumexp(dim=-1)
    over_keys = _softmax_from_lse(scores, query_lse[..., None])
    return (over_keys @ value.to(scores.dtype)).to(query.dtype), query_lse


def _dense(side: Side, dtype: torch.dtype) -> Tensor:
    """``[B or 1, 1, rows, tokens]``"""
    assert side is not None
    if isinstance(side, Tensor):
        return side[:, None].to(dtype)
    return side.dense(dtype)[None, None]
