"""Joint statistics by the passes that add weighted sums: every cell is a weight row.

One side is pooled by the kernel (a block of weight rows computes scores only where one of them is
not 0), the other by a matrix product with what it leaves. Transient memory is that of one sample:
``heads * cells * tokens`` of fp32.
"""

import torch
from torch import Tensor

from i2am.kernels import fused
from i2am.kernels.fused import statistics
from i2am.kernels.pooling import Pooling


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
    """Add ``W P V^T`` to ``g2r`` and ``W C V^T`` to ``r2g``.

    Raises:
        RuntimeError: The tensors are not on a GPU and Triton's interpreter is off.
        ValueError: The dtype is fp64, or head_dim exceeds 256.
    """
    fused.check(query)
    rows, columns = _weights(query_pooling, query), _weights(key_pooling, key)
    for item in range(len(query)):
        one = slice(item, item + 1)
        mask = None if bias is None else bias[one]
        # [heads, cells of queries, seqlen_k], then the keys pooled
        maps = _weighted(
            key[one],
            query[one],
            scale=scale,
            bias=None if mask is None else mask.mT,
            other_lse=query_lse[one],
            weights=rows,
        )
        _add(maps if key_pooling is None else maps @ columns[0].mT, g2r, item)
        # [heads, cells of keys, seqlen_q], then the queries pooled
        maps = _weighted(
            query[one], key[one], scale=scale, bias=mask, other_lse=key_lse[one], weights=columns
        ).mT
        _add(maps if query_pooling is None else rows[0] @ maps, r2g, item)


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


def _add(maps: Tensor, sums: tuple[Tensor, Tensor | None], item: int) -> None:
    mean, per_head = sums
    mean[item] += maps.mean(0)
    if per_head is not None:
        per_head[item] += maps
