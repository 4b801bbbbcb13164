"""Pooled probes by the passes that add weighted sums: every cell is a weight row.

One side is pooled by the kernel (a block of weight rows computes scores only where one of them is
not 0), the other by a matrix product with what it leaves. Transient memory is that of one sample:
``heads * cells * tokens`` of fp32.
"""

import torch
from torch import Tensor

from i2am.kernels.fused import statistics
from i2am.kernels.pooling import Pooling
from i2am.kernels.probes import Pooled


def accumulate_pooled(
    query: Tensor,
    key: Tensor,
    pooled: Pooled,
    *,
    scale: float,
    bias: Tensor | None,
    query_lse: Tensor,
    key_lse: Tensor,
) -> None:
    """Add ``W P V^T`` and ``W C V^T``, given both log-sum-exps."""
    rows, columns = _weights(pooled.left, query), _weights(pooled.right, key)
    for item in range(len(query)):
        one = slice(item, item + 1)
        mask = None if bias is None else bias[one]
        if pooled.over_keys:
            # [heads, cells of queries, seqlen_k], then the keys pooled
            maps = _weighted(
                key[one],
                query[one],
                scale=scale,
                bias=None if mask is None else mask.mT,
                other_lse=query_lse[one],
                weights=rows,
            )
            _add(maps if pooled.right is None else maps @ columns[0].mT, pooled.over_keys, item)
        if pooled.over_queries:
            # [heads, cells of keys, seqlen_q], then the queries pooled
            maps = _weighted(
                query[one],
                key[one],
                scale=scale,
                bias=mask,
                other_lse=key_lse[one],
                weights=columns,
            ).mT
            _add(maps if pooled.left is None else rows[0] @ maps, pooled.over_queries, item)


def _weighted(
    owner: Tensor,
    other: Tensor,
    *,
    scale: float,
    bias: Tensor | None,
    other_lse: Tensor,
    weights: Tensor,
) -> Tensor:
    """``[heads, rows, owners]``"""
    _, heads, owners, _ = owner.shape
    sums = owner.new_zeros((1, heads, weights.shape[1], owners), dtype=torch.float32)
    statistics.plan(
        owner, other, scale=scale, bias=bias, other_lse=other_lse, weights=weights, sums=sums
    ).run(owner.device)
    return sums[0]


def _weights(pooling: Pooling | None, tokens: Tensor) -> Tensor:
    """``[1, cells, seqlen]``"""
    if pooling is not None:
        return pooling.dense(torch.float32)[None]
    return torch.eye(tokens.shape[2], device=tokens.device)[None]


def _add(maps: Tensor, accumulators: list[Tensor], item: int) -> None:
    for sums in accumulators:
        sums[item] += maps if sums.ndim == 4 else maps.mean(0)
