"""Joint statistics on the CPU: one sweep over tiles, pooled and averaged while they are in cache.

The log-sum-exps are known, so every tile is final: a block of queries of a few heads against all
keys. A tile is pooled by whole rows (:func:`torch.nn.functional.embedding_bag`, a weighted sum of
rows), which is why it lies keys first where keys are pooled; queries are then pooled by a matrix
product with what is left. The weights take the softmax's normaliser along. Transient memory is two
tiles and what is pooled of one.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from i2am.kernels.pooling import Pooling
from i2am.kernels.streaming import SHARED_RANGE, TILE_ELEMENTS, tiles

Sums = tuple[Tensor, Tensor | None]
"""Accumulators of the mean over the heads, and of every head."""


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
    g2r: Sums,
    r2g: Sums,
) -> None:
    """Add ``W P V^T`` to ``g2r`` and ``W C V^T`` to ``r2g``."""
    compute = torch.promote_types(query.dtype, torch.float32)
    heads, seqlen_k = query.shape[1], key.shape[2]
    blocks = list(_blocks(query_pooling, heads, query.shape[2], against=seqlen_k))
    largest = max(_length(group) * _length(queries) for group, queries, _, _ in blocks) * seqlen_k
    buffers = query.new_empty(2, largest, dtype=compute)
    for item in range(len(query)):
        sample = _Sample(
            query=query[item].to(compute),
            key=key[item].to(compute),
            scale=scale,
            bias=None if bias is None else bias[item],
            query_lse=query_lse[item],
            key_lse=key_lse[item],
            key_pooling=key_pooling,
            buffers=buffers,
        )
        for group, queries, cells, pooling in blocks:
            both = sample.maps(group, queries, pooling)
            for (mean, per_head), maps in zip((g2r, r2g), both, strict=True):
                if per_head is not None:
                    per_head[item, group, cells] += maps
                mean[item, cells].add_(maps.sum(0), alpha=1 / heads)


@dataclass
class _Sample:
    """One batch item, in the compute dtype."""

    query: Tensor  # [H, M, D]
    key: Tensor  # [H, N, D]
    scale: float
    bias: Tensor | None  # [H, M, N]
    query_lse: Tensor  # [H, M]
    key_lse: Tensor  # [H, N]
    key_pooling: Pooling | None
    buffers: Tensor  # [2, elements of a tile]

    def __post_init__(self) -> None:
        # what is fully masked attends to nothing: exp(-inf - inf) is 0, exp(-inf + inf) NaN
        self.query_lse = self.query_lse.masked_fill(self.query_lse.isneginf(), torch.inf)
        self.key_lse = self.key_lse.masked_fill(self.key_lse.isneginf(), torch.inf)
        both = torch.cat([self.query_lse.flatten(), self.key_lse.flatten()])
        # then exp(S) neither over- nor underflows where it matters: see streaming.py
        self.shared = bool((both[both.isfinite()].abs() <= SHARED_RANGE).all())

    def maps(self, heads: slice, queries: slice, pooling: Pooling | None) -> Iterator[Tensor]:
        """``W P V^T`` and then ``W C V^T`` of a block, ``[h, cells of queries, cells of keys]``.

        The second may overwrite the first.
        """
        scores, other = self._scores(heads, queries)
        rows, columns = self.query_lse[heads, queries], self.key_lse[heads]
        if self.shared:
            exponentials = scores.exp_()
            yield self._pooled(exponentials, pooling, other, rows=rows.neg().exp())
            yield self._pooled(exponentials, pooling, other, columns=columns.neg().exp())
            return
        rows, columns = rows[..., None], columns[:, None]
        if self.key_pooling is not None:
            rows, columns = rows.mT, columns.mT
        yield self._pooled(torch.sub(scores, rows, out=other).exp_(), pooling, other)
        yield self._pooled(scores.sub_(columns).exp_(), pooling, scores)

    def _scores(self, heads: slice, queries: slice) -> tuple[Tensor, Tensor]:
        """``scale * Q K^T + bias`` and as much room: ``[h, m, N]``, where keys are pooled
        ``[h, N, m]``."""
        left, right = self.query[heads, queries], self.key[heads]
        bias = None if self.bias is None else self.bias[heads, queries]
        if self.key_pooling is not None:
            left, right = right, left
            bias = None if bias is None else bias.mT
        shape = (left.shape[0], left.shape[1], right.shape[1])
        scores, other = self.buffers[:, : math.prod(shape)].view(2, *shape)
        # beta=0 ignores what the buffer held, NaN included; the scale of large logits is applied to
        # the product, where one rounding of it shows
        alpha = self.scale if self.shared else 1
        torch.baddbmm(scores, left, right.mT, beta=0, alpha=alpha, out=scores)
        if not self.shared:
            scores *= self.scale
        if bias is not None:
            scores += bias
        return scores, other

    def _pooled(
        self,
        tile: Tensor,
        pooling: Pooling | None,
        out: Tensor,
        *,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """``W diag(rows) tile diag(columns) V^T``; in ``out`` where nothing is pooled.

        One of ``rows`` ``[h, m]`` and ``columns`` ``[h, N]`` may be given.
        """
        if self.key_pooling is not None:
            maps = _row_sums(tile, self.key_pooling, columns)  # [h, cells of keys, m]
            if pooling is not None:
                weights = pooling.dense(tile.dtype)
                maps = maps @ (weights if rows is None else weights * rows[:, None]).mT
            elif rows is not None:
                maps *= rows[:, None]
            return maps.mT
        if pooling is not None:
            maps = _row_sums(tile, pooling, rows)
            return maps if columns is None else maps.mul_(columns[:, None])
        if rows is not None:
            return torch.mul(tile, rows[..., None], out=out)
        return tile if columns is None else torch.mul(tile, columns[:, None], out=out)


def _row_sums(tile: Tensor, pooling: Pooling, factors: Tensor | None) -> Tensor:
    """``[h, cells, n]``, pooled from the rows of ``[h, tokens, n]``, multiplied by factors."""
    heads, tokens, columns = tile.shape
    steps = torch.arange(heads)[:, None]
    weights = pooling.weights.to(tile.dtype).expand(heads, -1)
    if factors is not None:
        weights = weights * factors[:, pooling.tokens]
    sums = F.embedding_bag(
        (pooling.tokens + steps * tokens).flatten(),
        tile.view(heads * tokens, columns),
        (pooling.starts + steps * len(pooling.tokens)).flatten(),
        mode="sum",
        per_sample_weights=weights.flatten(),
    )
    return sums.view(heads, pooling.cells, columns)


def _blocks(
    pooling: Pooling | None, heads: int, queries: int, *, against: int
) -> Iterator[tuple[slice, slice, slice, Pooling | None]]:
    """Heads, queries, cells and how they are pooled, for each tile."""
    if pooling is None:
        for group, blocks in tiles(heads, queries, against=against):
            for block in blocks:
                yield group, block, block, None
        return
    for cells, tokens, part in pooling.parts():
        together = max(TILE_ELEMENTS // (part.size * against), 1)
        for head in range(0, heads, together):
            yield slice(head, min(head + together, heads)), tokens, cells, part


def _length(part: slice) -> int:
    return int(part.stop - part.start)
