"""The CPU path: tiles of the attention matrix, one exponential for both softmaxes.

``E = exp(Q K^T)`` is formed tile by tile; its row and column sums normalise both directions,
``W P = (W / row sums) E`` and ``C u = E (u / column sums)``. A tile is a block of queries of a few
heads against all keys, small enough for the cores' own caches: row sums, ``W P`` and a part of the
column sums come from one sweep. ``C u`` comes from the same exponentials where those of a head may
be kept, else from a second sweep. Where the row log-sum-exp is known already, blocks of keys
against all queries need one sweep, whatever the length, and keep nothing. Transient memory is one
tile, or up to ``KEPT_ELEMENTS`` numbers where exponentials are kept, in fp32 (fp64 for fp64
inputs); a tile more where the logits range too far for one exponential.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from i2am.kernels.native import attention_with_lse

# 5 MiB of fp32, written and read several times; measured best on two cores of 1 MiB of L2 each
TILE_ELEMENTS = 5 << 18
# 28 MiB of fp32, written and read once: two heads of 3072 queries against 1037 keys
KEPT_ELEMENTS = 7 << 20
# queries (or keys) of a tile before it takes more heads: matrix products want that many
BLOCK = 96
# Both softmaxes share exp(S) while every sum of it lies within e^-60 .. e^60: then nothing over- or
# underflows fp32 (e^88) and no term that could matter (e^-27 of its maximum) is lost.
SHARED_RANGE = 60.0
# A log-sum-exp from the attention call is off by a few eps * |lse| (and more for 16-bit inputs),
# which exp() turns into a relative error of P; beyond this size it is computed afresh instead.
TRUSTED_LSE = 10.0
# exp2 is vectorised where exp takes two to three times as long; log2(e) * x is rounded once more
LOG2E = math.log2(math.e)
# More weight rows than this are regions, each 0 on most queries: a block of queries takes those
# that see it.
FEW_ROWS = 16


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
    """Add ``C u`` to ``r2g`` and ``W P`` to ``g2r``; returns ``(query_lse, key_lse)``."""
    compute = torch.promote_types(query.dtype, torch.float32)
    batch, heads, seqlen_q, _ = query.shape
    seqlen_k = key.shape[2]
    row_lse = query.new_empty(batch, heads, seqlen_q, dtype=compute)
    key_lse = key.new_empty(batch, heads, seqlen_k, dtype=compute)
    trusted, too_wide = [False] * batch, [False] * batch
    if query_lse is not None:
        row_lse.copy_(query_lse)
        largest = row_lse.abs().amax((1, 2))
        too_wide = (largest > SHARED_RANGE).tolist()
        if query.dtype == compute and query_weights.shape[1] <= FEW_ROWS:
            trusted = (largest <= TRUSTED_LSE).tolist()
    tile = max(TILE_ELEMENTS, seqlen_q, seqlen_k)
    if not all(trusted) and seqlen_q * seqlen_k <= KEPT_ELEMENTS:
        tile = max(tile, KEPT_ELEMENTS)
    buffer = query.new_empty(min(heads * seqlen_q * seqlen_k, tile), dtype=compute)
    for item in range(batch):
        sweep = _Sweep(
            query=query[item].to(compute),
            key=key[item].to(compute),
            scale=scale,
            bias=None if bias is None else bias[item],
            query_weights=query_weights[item].to(compute),
            key_weights=key_weights[item].to(compute),
            r2g=None if r2g is None else r2g[item],
            g2r=None if g2r is None else g2r[item],
            query_lse=row_lse[item],
            key_lse=key_lse[item],
            buffer=buffer,
        )
        if trusted[item]:
            sweep.key_blocks()
        else:
            sweep.query_blocks(shifted=too_wide[item])
    return row_lse, key_lse


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
    query_lse, _ = accumulate(
        query,
        key,
        scale=scale,
        bias=bias,
        query_weights=query.new_empty(1, 0, query.shape[2]).expand(len(query), -1, -1),
        key_weights=key.new_empty(1, 0, key.shape[2]).expand(len(key), -1, -1),
        r2g=None,
        g2r=None,
        query_lse=None,
    )
    # PyTorch leaves the output of a fully masked row undefined
    return output.masked_fill(query_lse.isneginf()[..., None], 0.0), query_lse


@dataclass
class _Sweep:
    """One batch item: inputs in the compute dtype, and where its results go."""

    query: Tensor  # [H, M, D]
    key: Tensor  # [H, N, D]
    scale: float
    bias: Tensor | None  # [H, M, N]
    query_weights: Tensor  # [R, M]
    key_weights: Tensor  # [U, N]
    r2g: Tensor | None  # [H, U, M]
    g2r: Tensor | None  # [H, R, N]
    query_lse: Tensor  # [H, M]
    key_lse: Tensor  # [H, N]
    buffer: Tensor  # every tile of scores is written here

    def query_blocks(self, *, shifted: bool) -> None:
        """Blocks of queries against all keys; ``shifted`` takes ``query_lse`` off the scores."""
        length, against = self.query.shape[1], self.key.shape[1]
        kept = len(self.buffer) // (length * against)
        for heads, blocks in tiles(*self.query.shape[:2], against=against, most=kept):
            if not self._shared_exponential(heads, blocks, shifted=shifted):
                self._separate_exponentials(heads, blocks)

    def key_blocks(self) -> None:
        """All queries against blocks of keys, given ``query_lse``: the sums of a tile are final."""
        inverse_rows = (-self.query_lse).exp()
        for heads, blocks in tiles(*self.key.shape[:2], against=self.query.shape[1]):
            weights = self.query_weights * inverse_rows[heads, None]
            for keys in blocks:
                exponentials = self._exponentials(heads, _ALL, keys)  # [h, M, n]
                if self.g2r is not None:
                    self.g2r[heads, :, keys] += weights @ exponentials
                key_max = exponentials.new_zeros(())
                columns = exponentials.sum(dim=1)
                if not _within_shared_range(columns):
                    scores = self._scores(heads, _ALL, keys)
                    key_max = scores.amax(dim=1)
                    exponentials = exp_(scores.sub_(_finite(key_max)[:, None]))
                    columns = exponentials.sum(dim=1)
                self.key_lse[heads, keys] = key_max + columns.log()
                if self.r2g is not None:
                    votes = _over(self.key_weights[:, keys], columns)
                    self.r2g[heads] += (exponentials @ votes.mT).mT

    def _shared_exponential(
        self, heads: slice, blocks: list[slice], *, shifted: bool = False
    ) -> bool:
        """One exponential serves both softmaxes; False, with nothing added, where it cannot.

        ``shifted`` takes a row's known log-sum-exp off its scores, so that rows of any size are in
        range. As a shift it may be inexact: rows are normalised by their own sums. Columns then
        weigh each row by ``exp(shift - pivot)``, the pivot being the largest shift of a head.
        """
        shift = _finite(self.query_lse[heads]).clone() if shifted else None
        pivot = key_weight = None
        if shift is not None:
            pivot = shift.amax(dim=1, keepdim=True)
            key_weight = (shift - pivot).exp()  # [h, M]
        columns = torch.zeros_like(self.key_lse[heads])
        g2r = None if self.g2r is None else torch.zeros_like(self.g2r[heads])
        keep = columns.numel() * self.query.shape[1] <= len(self.buffer)
        kept: list[Tensor] = []
        place = 0
        for queries in blocks:
            # [h, m, N]
            exponentials = self._exponentials(heads, queries, _ALL, shift, place=place)
            if keep:
                kept.append(exponentials)
                place += exponentials.numel()
            rows = exponentials.sum(dim=2)
            if not _within_shared_range(rows):
                return False
            self.query_lse[heads, queries] = rows.log()
            if shift is None or key_weight is None:
                columns += exponentials.sum(dim=1)
            else:
                self.query_lse[heads, queries] += shift[:, queries]
                columns += (key_weight[:, None, queries] @ exponentials)[:, 0]
            if g2r is not None:
                seen, weights = self._weights(queries)
                g2r[:, seen] += (weights / rows[:, None]) @ exponentials
        if not _within_shared_range(columns):
            return False
        self.key_lse[heads] = columns.log() if pivot is None else columns.log() + pivot
        if self.g2r is not None and g2r is not None:
            self.g2r[heads] += g2r
        if self.r2g is not None:
            votes = (self.key_weights / columns[:, None]).mT  # [h, N, U]
            for index, queries in enumerate(blocks):
                exponentials = (
                    kept[index] if keep else self._exponentials(heads, queries, _ALL, shift)
                )
                shares = (exponentials @ votes).mT
                if key_weight is not None:
                    shares *= key_weight[:, None, queries]
                self.r2g[heads, :, queries] += shares
        return True

    def _separate_exponentials(self, heads: slice, blocks: list[slice]) -> None:
        """Any range, masks included: each softmax is shifted by its own maximum."""
        key_max = torch.full_like(self.key_lse[heads], -torch.inf)
        columns = torch.zeros_like(key_max)
        for queries in blocks:
            scores = self._scores(heads, queries, _ALL)
            new_max = torch.maximum(key_max, scores.amax(dim=1))
            shift = _finite(new_max)
            columns *= (key_max - shift).exp()
            columns += exp_(scores - shift[:, None]).sum(dim=1)
            key_max = new_max
            query_max = scores.amax(dim=2)
            exponentials = exp_(scores.sub_(_finite(query_max)[..., None]))
            rows = exponentials.sum(dim=2)
            self.query_lse[heads, queries] = query_max + rows.log()
            if self.g2r is not None:
                seen, weights = self._weights(queries)
                self.g2r[heads, seen] += _over(weights, rows) @ exponentials
        self.key_lse[heads] = key_max + columns.log()
        if self.r2g is not None:
            votes = _over(self.key_weights, columns).mT
            for queries in blocks:
                scores = self._scores(heads, queries, _ALL)
                exponentials = exp_(scores.sub_(_finite(key_max)[:, None]))
                self.r2g[heads, :, queries] += (exponentials @ votes).mT

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
        weights = self.query_weights[:, queries]
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


def _over(weights: Tensor, sums: Tensor) -> Tensor:
    """``weights [R, n]`` over ``sums [h, n]``; 0 where the sum is 0: nothing attends there."""
    return weights * sums.reciprocal().masked_fill(sums == 0, 0.0)[:, None]
