"""Joint statistics on the CPU: one sweep over tiles, pooled and averaged while they are in cache.

The log-sum-exps are known, so every tile is final: a block of queries of a few heads against all
keys. Pooling reads whole rows of a tile (:func:`torch.nn.functional.embedding_bag`, a weighted sum
of rows), which is why tiles lie keys first where keys are pooled; its weights take the softmax's
normaliser along. Transient memory is a tile, or two where the logits range too far for one
exponential, and what is pooled of it.
"""

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
    blocks = list(_blocks(query_pooling, *query.shape[1:3], against=key.shape[2]))
    for item in range(len(query)):
        sample = _Sample(
            query=query[item].to(compute),
            key=key[item].to(compute),
            scale=scale,
            bias=None if bias is None else bias[item],
            query_lse=query_lse[item],
            key_lse=key_lse[item],
            key_pooling=key_pooling,
        )
        for heads, queries, cells, bags in blocks:
            for (mean, per_head), maps in zip(
                (g2r, r2g), sample.maps(heads, queries, bags), strict=True
            ):
                if per_head is not None:
                    per_head[item, heads, cells] += maps
                mean[item, cells].add_(maps.sum(0), alpha=1 / query.shape[1])


@dataclass
class _Bags:
    """Rows to be summed: which, where each sum begins, and their weights."""

    rows: Tensor  # [E]
    starts: Tensor  # [cells]
    weights: Tensor  # [E]

    def sums(self, tile: Tensor, factors: Tensor | None = None) -> Tensor:
        """``[h, cells, n]`` of a tile ``[h, rows, n]``, whose rows are multiplied by factors."""
        heads, rows, columns = tile.shape
        steps = torch.arange(heads)[:, None]
        weights = self.weights.to(tile.dtype).expand(heads, -1)
        if factors is not None:
            weights = weights * factors[:, self.rows]
        sums = F.embedding_bag(
            (self.rows + steps * rows).flatten(),
            tile.reshape(heads * rows, columns),
            (self.starts + steps * len(self.rows)).flatten(),
            mode="sum",
            per_sample_weights=weights.flatten(),
        )
        return sums.view(heads, len(self.starts), columns)


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

    def __post_init__(self) -> None:
        # what is fully masked attends to nothing: exp(-inf - inf) is 0, exp(-inf + inf) NaN
        self.query_lse = self.query_lse.masked_fill(self.query_lse.isneginf(), torch.inf)
        self.key_lse = self.key_lse.masked_fill(self.key_lse.isneginf(), torch.inf)
        both = torch.cat([self.query_lse.flatten(), self.key_lse.flatten()])
        # then exp(S) neither over- nor underflows where it matters: see streaming.py
        self.shared = bool((both[both.isfinite()].abs() <= SHARED_RANGE).all())
        self.key_bags = None
        if self.key_pooling is not None:
            pooling = self.key_pooling
            self.key_bags = _Bags(pooling.tokens, pooling.starts, pooling.weights)

    def maps(self, heads: slice, queries: slice, bags: _Bags | None) -> tuple[Tensor, Tensor]:
        """``W P V^T`` and ``W C V^T`` of a block, ``[h, cells of queries, cells of keys]``."""
        row_lse, column_lse = self.query_lse[heads, queries], self.key_lse[heads]
        scores = self._scores(heads, queries)
        rows: Tensor | None = None
        columns: Tensor | None = None
        if self.shared:
            over_keys = over_queries = scores.exp_()
            rows, columns = row_lse.neg().exp(), column_lse.neg().exp()
        elif self.key_bags is None:
            over_keys = (scores - row_lse[..., None]).exp_()
            over_queries = scores.sub_(column_lse[:, None]).exp_()
        else:
            over_keys = (scores - row_lse[:, None]).exp_()
            over_queries = scores.sub_(column_lse[..., None]).exp_()
        return (
            _pool_queries(self._pool_keys(over_keys, None), bags, rows),
            _pool_queries(self._pool_keys(over_queries, columns), bags, None),
        )

    def _scores(self, heads: slice, queries: slice) -> Tensor:
        """``scale * Q K^T + bias``: ``[h, m, N]``, or ``[h, N, m]`` where keys are pooled."""
        left, right = self.query[heads, queries], self.key[heads]
        bias = None if self.bias is None else self.bias[heads, queries]
        if self.key_bags is not None:
            left, right = right, left
            bias = None if bias is None else bias.mT
        scores = torch.bmm(left, right.mT)
        scores *= self.scale
        return scores if bias is None else scores.add_(bias)

    def _pool_keys(self, tile: Tensor, columns: Tensor | None) -> Tensor:
        """``[h, m, cells of keys]``, the keys multiplied by ``columns``."""
        if self.key_bags is not None:
            return self.key_bags.sums(tile, columns).mT
        return tile if columns is None else tile * columns[:, None]


def _pool_queries(tile: Tensor, bags: _Bags | None, rows: Tensor | None) -> Tensor:
    """``[h, cells of queries, n]`` of ``[h, m, n]``, the queries multiplied by ``rows``."""
    if bags is not None:
        return bags.sums(tile, rows)
    return tile if rows is None else tile * rows[..., None]


def _blocks(
    pooling: Pooling | None, heads: int, queries: int, *, against: int
) -> Iterator[tuple[slice, slice, slice, _Bags | None]]:
    """Heads, queries, cells and how they are pooled, for each tile."""
    if pooling is None:
        for group, blocks in tiles(heads, queries, against=against):
            for block in blocks:
                yield group, block, block, None
        return
    for cells, tokens, entries in pooling.bands:
        bags = _Bags(
            pooling.tokens[entries] - tokens.start,
            pooling.starts[cells] - entries.start,
            pooling.weights[entries],
        )
        together = max(TILE_ELEMENTS // ((tokens.stop - tokens.start) * against), 1)
        for head in range(0, heads, together):
            yield slice(head, min(head + together, heads)), tokens, cells, bags
