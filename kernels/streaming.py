"""The CPU path: tiles of the attention matrix, one exponential for both softmaxes.

``E = exp(Q K^T)`` is formed tile by tile; its row and column sums normalise both directions,
``W P = (W / row sums) E``, ``P V^T = (E V^T) / row sums`` and ``C V^T = E (V / column sums)^T``. A
tile is a block of queries of a few heads against all keys, small enough for the cores' own caches:
row sums, ``W P`` and a part of the column sums come from one sweep. ``C V^T`` and ``P V^T`` are
columns of one product with the same exponentials where those of a head may be kept, else from a
second sweep. Where the row normaliser is known already, it takes the place of row sums, and blocks
of keys against all queries need one sweep, whatever the length, and keep nothing. Transient memory
is one tile, or up to ``KEPT_ELEMENTS`` numbers where exponentials are kept, in fp32 (fp64 for fp64
inputs); a tile more where the logits range too far for one exponential.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from i2am.kernels.native import attention_with_lse
from i2am.kernels.probes import Probe, sort

# 5 MiB of fp32, written and read several times; measured best on two cores of 1 MiB of L2 each
TILE_ELEMENTS = 5 << 18
# 28 MiB of fp32, written and read once: two heads of 3072 queries against 1037 keys
KEPT_ELEMENTS = 7 << 20
# queries (or keys) of a tile before it takes more heads: matrix products want that many
BLOCK = 96
# Both softmaxes share exp(S) while every sum of it lies within e^-60 .. e^60: then nothing over- or
# underflows fp32 (e^88) and no term that could matter (e^-27 of its maximum) is lost.
SHARED_RANGE = 60.0
# Up to this size of its log-sum-exps logits are small enough for a factor of log2(e) in their scale
SMALL_LSE = 10.0
# exp2 is vectorised where exp takes two to three times as long; log2(e) * x is rounded once more
LOG2E = math.log2(math.e)
# More weight rows than this are regions, each 0 on most queries: a block of queries takes those
# that see it.
FEW_ROWS = 16


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
    compute = torch.promote_types(query.dtype, torch.float32)
    batch, heads, seqlen_q, _ = query.shape
    seqlen_k = key.shape[2]
    found = sort(probes)
    query_lse = query.new_empty(batch, heads, seqlen_q, dtype=compute)
    key_lse = key.new_empty(batch, heads, seqlen_k, dtype=compute)
    largest = [math.inf] * batch
    if normaliser is not None:
        query_lse = normaliser
        largest = _finite(normaliser).abs().amax((1, 2)).tolist()
    few = sum(weights.shape[1] for weights, _ in found.rows) <= FEW_ROWS
    by_keys = [few and size <= SMALL_LSE for size in largest]
    tile = max(TILE_ELEMENTS, seqlen_q, seqlen_k)
    twice = bool(found.votes or found.values) and not all(by_keys)
    if twice and seqlen_q * seqlen_k <= KEPT_ELEMENTS:
        tile = max(tile, KEPT_ELEMENTS)
    buffer = query.new_empty(min(heads * seqlen_q * seqlen_k, tile), dtype=compute)
    for item in range(batch):
        sweep = _Sweep(
            query=query[item].to(compute),
            key=key[item].to(compute),
            scale=scale,
            bias=None if bias is None else bias[item],
            rows=_Weighted.of(found.rows, item),
            votes=_Weighted.of(found.votes, item),
            values=_Weighted.of(found.values, item),
            normaliser=None if normaliser is None else normaliser[item],
            query_lse=query_lse[item],
            key_lse=key_lse[item],
            buffer=buffer,
        )
        if by_keys[item]:
            sweep.key_blocks()
        else:
            sweep.query_blocks(shifted=SMALL_LSE < largest[item] < math.inf)
    del buffer, sweep
    for pooled in found.pooled:
        # it needs this module's tiles
        from i2am.kernels.joint_streaming import accumulate_pooled

        accumulate_pooled(
            query, key, pooled, scale=scale, bias=bias, query_lse=query_lse, key_lse=key_lse
        )
    return query_lse, key_lse


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """PyTorch's attention, ``(output, query_lse)``; a fully masked row gives zeros."""
    if bias is None:
        with_lse = attention_with_lse(query, key, value, scale=scale)
        if with_lse is not None:
            return with_lse
    mask = bias
    if bias is not None and (bias.dtype != torch.float32 or query.dtype == torch.float64):
        # fp32 masks pass as they are: rounded to 16 bits, a large one would be -inf
        mask = bias.to(query.dtype)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    query_lse, _ = accumulate(query, key, (), scale=scale, bias=bias, normaliser=None)
    # PyTorch leaves the output of a fully masked row undefined
    return output.masked_fill(query_lse.isneginf()[..., None], 0.0), query_lse


class _Weighted(NamedTuple):
    """What the probes of one kind add up: all their weights, and where each adds its own."""

    weights: Tensor | None  # [R, tokens of the side that is summed over]
    sums: list[Tensor]  # [H, rows of a probe, tokens of the other side]

    @classmethod
    def of(cls, probes: list[tuple[Tensor, Tensor]], item: int) -> "_Weighted":
        """Those of one batch item."""
        weights = [weights[item] for weights, _ in probes]
        return cls(torch.cat(weights) if weights else None, [sums[item] for _, sums in probes])

    def add(self, part: Tensor, heads: slice, tokens: slice) -> None:
        """Add ``[h, R, tokens]``."""
        sizes = [sums.shape[1] for sums in self.sums]
        for sums, own in zip(self.sums, part.split(sizes, dim=1), strict=True):
            sums[heads, :, tokens] += own


@dataclass
class _Sweep:
    """One batch item: inputs in the compute dtype, and where its results go."""

    query: Tensor  # [H, M, D]
    key: Tensor  # [H, N, D]
    scale: float
    bias: Tensor | None  # [H, M, N]
    rows: _Weighted  # W P
    votes: _Weighted  # C V^T
    values: _Weighted  # P V^T
    normaliser: Tensor | None  # [H, M]
    query_lse: Tensor  # [H, M], written where there is no normaliser
    key_lse: Tensor  # [H, N], written
    buffer: Tensor  # every tile of scores is written here

    def query_blocks(self, *, shifted: bool) -> None:
        """Blocks of queries against all keys; ``shifted`` takes the normaliser off the scores."""
        length, against = self.query.shape[1], self.key.shape[1]
        kept = len(self.buffer) // (length * against)
        for heads, blocks in tiles(*self.query.shape[:2], against=against, most=kept):
            if not self._shared_exponential(heads, blocks, shifted=shifted):
                self._separate_exponentials(heads, blocks)

    def key_blocks(self) -> None:
        """All queries against blocks of keys, given the normaliser: a tile's sums are final."""
        assert self.normaliser is not None
        back = _back(0.0, self.normaliser)
        for heads, blocks in tiles(*self.key.shape[:2], against=self.query.shape[1]):
            for keys in blocks:
                exponentials = self._exponentials(heads, _ALL, keys)  # [h, M, n]
                if self.rows.weights is not None:
                    weights = self.rows.weights * back[heads, None]
                    self.rows.add(weights @ exponentials, heads, keys)
                shares: Tensor | None = back[heads]
                key_max = exponentials.new_zeros(())
                columns = exponentials.sum(dim=1)
                if not _within_shared_range(columns):
                    self._add_columns(heads, _ALL, keys, exponentials, back=shares)
                    shares = None
                    scores = self._scores(heads, _ALL, keys)
                    key_max = scores.amax(dim=1)
                    exponentials = exp_(scores.sub_(_finite(key_max)[:, None]))
                    columns = exponentials.sum(dim=1)
                self.key_lse[heads, keys] = key_max + columns.log()
                self._add_columns(heads, _ALL, keys, exponentials, columns=columns, back=shares)

    def _shared_exponential(
        self, heads: slice, blocks: list[slice], *, shifted: bool = False
    ) -> bool:
        """One exponential serves both softmaxes; False, with nothing added, where it cannot.

        ``shifted`` takes a row's normaliser off its scores, so that rows of any size are in range.
        Columns then weigh each row by ``exp(shift - pivot)``, the pivot being the largest shift of
        a head. What a known normaliser makes of a row that underflows is below ``e^-27``.
        """
        normaliser = None if self.normaliser is None else self.normaliser[heads]
        shift = pivot = key_weight = None
        if shifted and normaliser is not None:
            pivot = _finite(normaliser.amax(dim=1, keepdim=True))
            shift = torch.where(normaliser.isneginf(), pivot, normaliser)
            key_weight = (shift - pivot).exp()  # [h, M]
        if normaliser is not None:
            back = _back(0.0 if shift is None else shift, normaliser)
        else:
            back = torch.empty_like(self.query_lse[heads])
        columns = torch.zeros_like(self.key_lse[heads])
        sums = self._no_rows(heads)
        keep = columns.numel() * self.query.shape[1] <= len(self.buffer)
        kept: list[Tensor] = []
        place = 0
        for queries in blocks:
            # [h, m, N]
            exponentials = self._exponentials(heads, queries, _ALL, shift, place=place)
            if keep:
                kept.append(exponentials)
                place += exponentials.numel()
            if normaliser is None:
                rows = exponentials.sum(dim=2)
                if not _within_shared_range(rows):
                    return False
                self.query_lse[heads, queries] = rows.log()
                back[:, queries] = rows.reciprocal()
            if key_weight is None:
                columns += exponentials.sum(dim=1)
            else:
                columns += (key_weight[:, None, queries] @ exponentials)[:, 0]
            self._weigh(sums, queries, exponentials, back[:, queries])
        if not _within_shared_range(columns):
            return False
        self.key_lse[heads] = columns.log() if pivot is None else columns.log() + pivot
        self.rows.add(sums, heads, _ALL)
        if self.votes.sums or self.values.sums:
            for index, queries in enumerate(blocks):
                exponentials = (
                    kept[index] if keep else self._exponentials(heads, queries, _ALL, shift)
                )
                self._add_columns(
                    heads,
                    queries,
                    _ALL,
                    exponentials,
                    columns=columns,
                    back=back[:, queries],
                    key_weight=None if key_weight is None else key_weight[:, queries],
                )
        return True

    def _separate_exponentials(self, heads: slice, blocks: list[slice]) -> None:
        """Any range, masks included: each softmax is shifted by its own maximum."""
        key_max = torch.full_like(self.key_lse[heads], -torch.inf)
        columns = torch.zeros_like(key_max)
        sums = self._no_rows(heads)
        for queries in blocks:
            scores = self._scores(heads, queries, _ALL)
            new_max = torch.maximum(key_max, scores.amax(dim=1))
            shift = _finite(new_max)
            columns *= (key_max - shift).exp()
            columns += exp_(scores - shift[:, None]).sum(dim=1)
            key_max = new_max
            query_max = scores.amax(dim=2)
            exponentials = exp_(scores.sub_(_finite(query_max)[..., None]))
            if self.normaliser is None:
                rows = exponentials.sum(dim=2)
                self.query_lse[heads, queries] = query_max + rows.log()
                back = _inverse(rows)
            else:
                back = _back(query_max, self.normaliser[heads, queries])
            self._weigh(sums, queries, exponentials, back)
            self._add_columns(heads, queries, _ALL, exponentials, back=back)
        self.rows.add(sums, heads, _ALL)
        self.key_lse[heads] = key_max + columns.log()
        if self.votes.sums:
            for queries in blocks:
                scores = self._scores(heads, queries, _ALL)
                exponentials = exp_(scores.sub_(_finite(key_max)[:, None]))
                self._add_columns(heads, queries, _ALL, exponentials, columns=columns)

    def _no_rows(self, heads: slice) -> Tensor:
        """Zeros for all rows of ``W P``, ``[h, R, N]``."""
        like = self.key_lse[heads]
        rows = 0 if self.rows.weights is None else len(self.rows.weights)
        return like.new_zeros((like.shape[0], rows, like.shape[1]))

    def _weigh(self, sums: Tensor, queries: slice, exponentials: Tensor, back: Tensor) -> None:
        """Add ``W P`` of a tile ``[h, m, N]`` to ``sums``, ``P`` being ``back`` times the tile."""
        if self.rows.weights is not None:
            seen, weights = self._weights(queries)
            sums[:, seen] += (weights * back[:, None]) @ exponentials

    def _add_columns(
        self,
        heads: slice,
        queries: slice,
        keys: slice,
        exponentials: Tensor,
        *,
        columns: Tensor | None = None,
        back: Tensor | None = None,
        key_weight: Tensor | None = None,
    ) -> None:
        """Add ``C V^T`` and ``P V^T`` of a tile ``[h, m, n]``, in one product.

        ``C`` is the tile over ``columns`` ``[h, n]``, times ``key_weight`` ``[h, m]`` if given;
        ``P`` is the tile times ``back`` ``[h, m]``. Without ``columns`` or ``back`` that part is
        left out.
        """
        weights = []
        votes = self.votes.weights if columns is not None else None
        if votes is not None and columns is not None:
            weights.append(votes[:, keys] * _inverse(columns)[:, None])
        values = self.values.weights if back is not None else None
        if values is not None:
            weights.append(values[:, keys].expand(len(exponentials), -1, -1))
        if not weights:
            return
        both = weights[0] if len(weights) == 1 else torch.cat(weights, dim=1)
        sums = (exponentials @ both.mT).mT  # [h, U + G, m]
        if votes is not None:
            part = sums[:, : len(votes)]
            self.votes.add(
                part if key_weight is None else part * key_weight[:, None], heads, queries
            )
        if values is not None and back is not None:
            self.values.add(sums[:, -len(values) :] * back[:, None], heads, queries)

    def _exponentials(
        self,
        heads: slice,
        queries: slice,
        keys: slice,
        shift: Tensor | None = None,
        *,
        place: int = 0,
    ) -> Tensor:
        """``exp(S - shift)`` of a tile, ``shift`` ``[h, M]`` being each query's own."""
        if shift is None:
            return self._scores(heads, queries, keys, place=place, unit=LOG2E).exp2_()
        scores = self._scores(heads, queries, keys, place=place)
        return exp_(scores.sub_(shift[:, queries, None]))

    def _weights(self, queries: slice) -> tuple[slice | Tensor, Tensor]:
        """Which weight rows see these queries, and their weights there."""
        assert self.rows.weights is not None
        weights = self.rows.weights[:, queries]
        if len(weights) <= FEW_ROWS:
            return _ALL, weights
        seen = (weights != 0).any(dim=1).nonzero()[:, 0]
        return seen, weights[seen]

    def _scores(
        self,
        heads: slice,
        queries: slice,
        keys: slice,
        *,
        place: int = 0,
        unit: float | None = None,
    ) -> Tensor:
        """``scale * Q K^T + bias`` of a tile, ``[h, m, n]``, from ``place`` on in the buffer.

        Multiplied by ``unit`` if given, which is free: it goes with the scale into the product. A
        large logit would be rounded once more by that; else the scale is applied afterwards.
        """
        q, k = self.query[heads, queries], self.key[heads, keys].mT
        shape = (q.shape[0], q.shape[1], k.shape[2])
        scores = self.buffer[place : place + math.prod(shape)].view(shape)
        # beta=0 ignores what the buffer held, NaN included
        alpha = 1.0 if unit is None else self.scale * unit
        torch.baddbmm(scores, q, k, beta=0, alpha=alpha, out=scores)
        if unit is None:
            scores *= self.scale
        if self.bias is not None:
            scores.add_(self.bias[heads, queries, keys], alpha=1.0 if unit is None else unit)
        return scores


_ALL = slice(None)


def tiles(
    heads: int, length: int, *, against: int, most: int = 0
) -> Iterator[tuple[slice, list[slice]]]:
    """Groups of heads, at most ``most`` if given, with equal blocks of ``length``."""
    together = max(min(TILE_ELEMENTS // (BLOCK * against), most or heads, heads), 1)
    together = -(-heads // -(-heads // together))
    longest = max(TILE_ELEMENTS // (together * against), 1)
    block = -(-length // -(-length // longest))
    blocks = [slice(start, min(start + block, length)) for start in range(0, length, block)]
    for head in range(0, heads, together):
        yield slice(head, min(head + together, heads)), blocks


def exp_(x: Tensor) -> Tensor:
    """``e ** x`` in place, by base 2."""
    return x.mul_(LOG2E).exp2_()


def _within_shared_range(sums: Tensor) -> bool:
    low, high = sums.aminmax()
    # NaN fails both comparisons, an overflow the second
    return bool(low >= math.exp(-SHARED_RANGE)) and bool(high <= math.exp(SHARED_RANGE))


def _finite(maxima: Tensor) -> Tensor:
    # a fully masked row or column has the maximum -inf, and -inf - -inf would be NaN
    return maxima.masked_fill(maxima.isneginf(), 0.0)


def _inverse(sums: Tensor) -> Tensor:
    # nothing attends where a sum is 0
    return sums.reciprocal().masked_fill(sums == 0, 0.0)


def _back(shift: Tensor | float, normaliser: Tensor) -> Tensor:
    """What ``exp(S - shift)`` is multiplied by to be ``P``; 0 where the normaliser is ``-inf``."""
    return (shift - normaliser).exp().masked_fill(normaliser.isneginf(), 0.0)
