"""The specification: materialises the attention matrix and reads like README.md.

Memory is O(seqlen_q * seqlen_k) per head. Runs anywhere and in fp64, where it is the ruler the
other implementations are measured with.
"""

import torch
from torch import Tensor

from i2am.kernels.pooling import Pooling


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
    *,
    scale: float,
    bias: Tensor | None,
    query_weights: Tensor,
    key_weights: Tensor,
    r2g: Tensor | None,
    g2r: Tensor | None,
    query_lse: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Add ``C u`` to ``r2g`` and ``W P`` to ``g2r``; returns ``(query_lse, key_lse)``.

    ``query_lse`` is accepted like everywhere and computed afresh: the specification trusts nobody.
    """
    scores = _scores(query, key, scale, bias)
    query_lse = scores.logsumexp(dim=-1)  # [B, H, M]
    key_lse = scores.logsumexp(dim=-2)  # [B, H, N]
    if r2g is not None:
        over_queries = _softmax_from_lse(scores, key_lse[..., None, :])  # C
        r2g += (over_queries @ key_weights[:, None].mT.to(scores.dtype)).mT
    if g2r is not None:
        over_keys = _softmax_from_lse(scores, query_lse[..., None])  # P
        g2r += query_weights[:, None].to(scores.dtype) @ over_keys
    return query_lse, key_lse


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Plain attention: ``(output in query.dtype, query_lse)``; a fully masked row gives zeros."""
    scores = _scores(query, key, scale, bias)
    query_lse = scores.logsumexp(dim=-1)
    over_keys = _softmax_from_lse(scores, query_lse[..., None])
    return (over_keys @ value.to(scores.dtype)).to(query.dtype), query_lse


def accumulate_joint(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    bias: Tensor | None,
    query_lse: Tensor,
    key_lse: Tensor,
    query_pooling: Pooling | None,
    key_pooling: Pooling | None,
    g2r: tuple[Tensor, Tensor | None],
    r2g: tuple[Tensor, Tensor | None],
) -> None:
    """Add ``W P V^T`` to ``g2r`` and ``W C V^T`` to ``r2g``: mean over the heads, every head."""
    scores = _scores(query, key, scale, bias)
    over_keys = _softmax_from_lse(scores, query_lse[..., None])  # P
    over_queries = _softmax_from_lse(scores, key_lse[..., None, :])  # C
    for softmax, (mean, per_head) in ((over_keys, g2r), (over_queries, r2g)):
        if query_pooling is not None:
            softmax = query_pooling.dense(scores.dtype) @ softmax
        if key_pooling is not None:
            softmax = softmax @ key_pooling.dense(scores.dtype).mT
        mean += softmax.mean(dim=1)
        if per_head is not None:
            per_head += softmax
