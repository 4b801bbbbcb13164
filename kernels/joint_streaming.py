"""Pooled probes on the CPU: one sweep over tiles, pooled and averaged while they are in cache.

The log-sum-exps are known, so every tile is final: a block of queries of a few heads against all
keys. A tile is pooled by whole rows (:func:`torch.nn.functional.embedding_bag`, a weighted sum of
rows), which is why it lies keys first where keys are pooled; queries are then pooled by a matrix
product with what is left. The weights take the softmax's normaliser along. Transient memory is two
tiles and what is pooled of one.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from i2am.kernels.pooling import Pooling
from i2am.kernels.probes import Pooled
from i2am.kernels.streaming import LOG2E, SHARED_RANGE, SMALL_LSE, TILE_ELEMENTS, exp_, tiles


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
    compute = torch.promote_types(query.dtype, torch.float32)
    heads, seqlen_k = query.shape[1], key.shape[2]
    keys = None if pooled.right is None else _RowSums.of(pooled.right, heads, compute)
    blocks = list(_blocks(pooled.left, heads, query.shape[2], against=seqlen_k, dtype=compute))
    largest = max(_length(block.heads) * _length(block.queries) for block in blocks) * seqlen_k
    buffers = query.new_empty(2, largest, dtype=compute)
    for item in range(len(query)):
        sample = _Sample(
            query=query[item].to(compute),
            key=key[item].to(compute),
            scale=scale,
            bias=None if bias is None else bias[item],
            query_lse=query_lse[item],
            key_lse=key_lse[item],
            keys=keys,
            buffers=buffers,
        )
        wanted = [sums for sums in (pooled.over_keys, pooled.over_queries) if sums]
        for block in blocks:
            maps_of_block = sample.maps(block, bool(pooled.over_keys), bool(pooled.over_queries))
            for accumulators, maps in zip(wanted, maps_of_block, strict=True):
                for sums in accumulators:
                    if sums.ndim == 4:
                        sums[item, block.heads, block.cells] += maps
                    else:
                        sums[item, block.cells].add_(maps.sum(0), alpha=1 / heads)


@dataclass
class _RowSums:
    """Pools the rows of tiles, of all heads at once."""

    rows: Tensor  # [H * E]: of a tile [H * tokens, n]
    starts: Tensor  # [H * cells]
    weights: Tensor  # [H, E]
    pooling: Pooling

    @classmethod
    def of(cls, pooling: Pooling, heads: int, dtype: torch.dtype) -> "_RowSums":
        """For tiles of up to so many heads."""
        steps = torch.arange(heads, device=pooling.tokens.device)[:, None]
        return cls(
            (pooling.tokens + steps * pooling.size).flatten(),
            (pooling.starts + steps * len(pooling.tokens)).flatten(),
            pooling.weights.to(dtype).expand(heads, -1).contiguous(),
            pooling,
        )

    def weighted(self, factors: Tensor) -> Tensor:
        """Weights ``[h, E]`` of tokens that are multiplied by ``[h, tokens]``."""
        return self.weights[: len(factors)] * factors[:, self.pooling.tokens]

    def __call__(self, tile: Tensor, weights: Tensor) -> Tensor:
        """``[h, cells, n]`` of a tile ``[h, tokens, n]``."""
        heads, tokens, columns = tile.shape
        sums = F.embedding_bag(
            self.rows[: weights.numel()],
            tile.view(heads * tokens, columns),
            self.starts[: heads * self.pooling.cells],
            mode="sum",
            per_sample_weights=weights.view(-1),
        )
        return sums.view(heads, self.pooling.cells, columns)


class _Block(NamedTuple):
    """A tile: its heads and queries, the cells of these, and how they are pooled."""

    heads: slice
    queries: slice
    cells: slice
    pooled: _RowSums | None = None
    weights: Tensor | None = None
    """The same pooling as a matrix ``[cells, queries]``."""


@dataclass
class _Sample:
    """One batch item, in the compute dtype."""

    query: Tensor  # [H, M, D]
    key: Tensor  # [H, N, D]
    scale: float
    bias: Tensor | None  # [H, M, N]
    query_lse: Tensor  # [H, M]
    key_lse: Tensor  # [H, N]
    keys: _RowSums | None
    buffers: Tensor  # [2, elements of a tile]

    def __post_init__(self) -> None:
        # what is fully masked attends to nothing: exp(-inf - inf) is 0, exp(-inf + inf) NaN
        self.query_lse = self.query_lse.masked_fill(self.query_lse.isneginf(), torch.inf)
        self.key_lse = self.key_lse.masked_fill(self.key_lse.isneginf(), torch.inf)
        both = torch.cat([self.query_lse.flatten(), self.key_lse.flatten()])
        # then exp(S) neither over- nor underflows where it matters: see streaming.py
        largest = both.masked_fill(both.isinf(), 0).abs().max()
        self.shared = bool(largest <= SHARED_RANGE)
        # small logits can bear a factor of log2(e) in their scale
        self.unit = LOG2E if largest <= SMALL_LSE else 1.0
        self.rows = self.query_lse.neg().exp()
        self.columns = self.key_lse.neg().exp()
        self.column_weights = None
        if self.shared and self.keys is not None:
            self.column_weights = self.keys.weighted(self.columns)

    def maps(self, block: _Block, over_keys: bool, over_queries: bool) -> Iterator[Tensor]:
        """``W P V^T`` and then ``W C V^T``, ``[h, cells of queries, cells of keys]``, if wanted.

        The second may overwrite the first.
        """
        heads, queries = block.heads, block.queries
        scores, other = self._scores(heads, queries)
        if self.shared:
            exponentials = scores.exp_() if self.unit == 1.0 else scores.exp2_()
            if over_keys:
                yield self._pooled(exponentials, block, other, rows=self.rows[heads, queries])
            if over_queries:
                yield self._pooled(exponentials, block, other, columns=self.columns[heads])
            return
        rows, columns = self.query_lse[heads, queries, None], self.key_lse[heads, None]
        if self.keys is not None:
            rows, columns = rows.mT, columns.mT
        if over_keys:
            yield self._pooled(exp_(torch.sub(scores, rows, out=other)), block, other)
        if over_queries:
            yield self._pooled(exp_(scores.sub_(columns)), block, scores)

    def _scores(self, heads: slice, queries: slice) -> tuple[Tensor, Tensor]:
        """``scale * Q K^T + bias`` and as much room: ``[h, m, N]``, where keys are pooled
        ``[h, N, m]``; times ``unit``."""
        left, right = self.query[heads, queries], self.key[heads]
        bias = None if self.bias is None else self.bias[heads, queries]
        if self.keys is not None:
            left, right = right, left
            bias = None if bias is None else bias.mT
        shape = (left.shape[0], left.shape[1], right.shape[1])
        scores, other = self.buffers[:, : math.prod(shape)].view(2, *shape)
        # beta=0 ignores what the buffer held, NaN included; the scale of large logits is applied to
        # the product, where one rounding of it shows
        alpha = self.scale * self.unit if self.shared else 1
        torch.baddbmm(scores, left, right.mT, beta=0, alpha=alpha, out=scores)
        if not self.shared:
            scores *= self.scale
        if bias is not None:
            scores.add_(bias, alpha=self.unit)
        return scores, other

    def _pooled(
        self,
        tile: Tensor,
        block: _Block,
        out: Tensor,
        *,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """``W diag(rows) tile diag(columns) V^T``; in ``out`` where nothing is pooled.

        One of ``rows`` ``[h, m]`` and ``columns`` ``[h, N]`` may be given.
        """
        if self.keys is not None:
            weights = self.keys.weights if columns is None else self.column_weights
            assert weights is not None
            maps = self.keys(tile, weights[block.heads])  # [h, cells of keys, m]
            if block.weights is not None:
                wanted = block.weights if rows is None else block.weights * rows[:, None]
                maps = maps @ wanted.mT
            elif rows is not None:
                maps *= rows[:, None]
            return maps.mT
        if block.pooled is not None:
            weights = block.pooled.weights[: len(tile)]
            maps = block.pooled(tile, weights if rows is None else block.pooled.weighted(rows))
            return maps if columns is None else maps.mul_(columns[:, None])
        if rows is not None:
            return torch.mul(tile, rows[..., None], out=out)
        return tile if columns is None else torch.mul(tile, columns[:, None], out=out)


def _blocks(
    pooling: Pooling | None, heads: int, queries: int, *, against: int, dtype: torch.dtype
) -> Iterator[_Block]:
    if pooling is None:
        for group, blocks in tiles(heads, queries, against=against):
            for block in blocks:
                yield _Block(group, block, block)
        return
    for cells, tokens, part in pooling.parts():
        together = max(min(TILE_ELEMENTS // (part.size * against), heads), 1)
        pooled, weights = _RowSums.of(part, together, dtype), part.dense(dtype)
        for head in range(0, heads, together):
            group = slice(head, min(head + together, heads))
            yield _Block(group, tokens, cells, pooled, weights)


def _length(part: slice) -> int:
    return int(part.stop - part.start)
