"""The statistics as Triton kernels, for GPUs; on CPU tensors only under Triton's interpreter.

Where all keys of a head fit one tile (image tokens, text), two launches: row and partial column
log-sum-exps with parts of ``W P``, then all of them combined, ``C V^T`` and ``P V^T``. Otherwise
three passes at most, each over the whole of QK^T: row log-sum-exps (unless the normaliser is
given), then column log-sum-exps together with ``W P``, then ``C V^T`` together with ``P V^T``. A
second probe of a kind, or more weights than a block holds, are launches of their own.
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from i2am.kernels.arguments import runs_fused
from i2am.kernels.fused import forward, joint, short, statistics
from i2am.kernels.fused.configs import (
    MAX_HEAD_DIM,
    MAX_LOOPED_ROWS,
    MAX_ROW_BLOCK,
    fits_short,
    width,
)
from i2am.kernels.fused.primitives import INTERPRETED, read_together
from i2am.kernels.probes import Probe, sort

Weighted = tuple[Tensor, Tensor]
"""Weights ``[batch, rows, tokens]``, and the accumulator."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def is_available(device: torch.device) -> bool:
    """Whether the kernels run on ``device``: a GPU of compute capability 8.0 or newer (or one of
    AMD), or any device under Triton's interpreter.
    """
    return INTERPRETED or runs_fused(device)


def check(query: Tensor) -> None:
    """Refuse what the kernels cannot do.

    Raises:
        RuntimeError: The tensors are not on a GPU that can run them and Triton's interpreter is
            off.
        ValueError: The dtype is fp64, or head_dim exceeds 256.
    """
    if not is_available(query.device):
        if query.device.type == "cuda":
            card = torch.cuda.get_device_properties(query.device)
            raise RuntimeError(
                "impl='fused' needs a GPU of compute capability 8.0 or newer (bf16 matrix "
                f"instructions, shared memory for the tiles), got {card.name} with "
                f"{card.major}.{card.minor}; impl='streaming' runs on it"
            )
        raise RuntimeError(
            "impl='fused' needs tensors on a GPU, or TRITON_INTERPRET=1 in the environment before "
            f"triton is imported; got a query on {query.device}"
        )
    if query.dtype not in _DTYPES:
        raise ValueError(
            f"impl='fused' computes in fp32 and takes fp16, bf16 or fp32, got {query.dtype}; "
            "impl='reference' takes fp64"
        )
    if query.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(
            f"impl='fused' takes a head_dim up to {MAX_HEAD_DIM}, got {query.shape[-1]}"
        )


def accumulate(
    query: Tensor,
    key: Tensor,
    probes: Sequence[Probe],
    *,
    scale: float,
    bias: Tensor | None,
    normaliser: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Add what the probes read of both softmaxes; returns ``(query_lse, key_lse)``.

    Raises:
        RuntimeError: The tensors are not on a GPU and Triton's interpreter is off.
        ValueError: The dtype is fp64, or head_dim exceeds 256.
    """
    check(query)
    found = sort(probes)
    key_lse = key.new_empty(key.shape[:3], dtype=torch.float32)
    query_lse = normaliser
    values = [part for probe in found.values for part in _blocks(*probe)]
    rounds = list(zip_longest(found.rows, found.votes, values)) or [(None, None, None)]
    for rows, votes, shares in rounds:
        call = _Call(query, key, scale, bias, query_lse, key_lse)
        query_lse = call.run(rows, votes, shares)
    assert query_lse is not None
    for pooled in found.pooled:
        joint.accumulate_pooled(
            query, key, pooled, scale=scale, bias=bias, query_lse=query_lse, key_lse=key_lse
        )
    return query_lse, key_lse


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Plain attention: ``(output in query.dtype, query_lse)``; a fully masked row gives zeros.

    Raises:
        RuntimeError: The tensors are not on a GPU and Triton's interpreter is off.
        ValueError: The dtype is fp64, or head_dim exceeds 256.
    """
    check(query)
    output = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    launch = forward.plan(query, key, value, scale=scale, bias=bias, output=output, lse=lse)
    launch.run(query.device)
    return output, lse


class _Call(NamedTuple):
    """One probe of each kind at most, and the log-sum-exps beside them."""

    query: Tensor
    key: Tensor
    scale: float
    bias: Tensor | None
    query_lse: Tensor | None
    """``None`` where it is not known yet."""
    key_lse: Tensor
    """Written."""

    def run(self, rows: Weighted | None, votes: Weighted | None, shares: Weighted | None) -> Tensor:
        """Launch what adds ``W P``, ``C V^T`` and ``P V^T``; returns ``query_lse``."""
        query, key, row_lse = self.query, self.key, None
        query_lse = self.query_lse
        if query_lse is None:
            query_lse = row_lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        query_weights, g2r = rows or (None, None)
        key_weights, r2g = votes or (None, None)
        values, sums = shares or (None, None)
        most = max(1 if each is None else each[1].shape[2] for each in (rows, votes, shares))
        features = width(query.shape[3], read_together(query, key))
        if fits_short(features, query.element_size(), key.shape[2], most):
            for launch in short.plan(
                query,
                key,
                scale=self.scale,
                bias=self.bias,
                query_weights=query_weights,
                key_weights=key_weights,
                r2g=r2g,
                g2r=g2r,
                query_lse=query_lse,
                row_lse=row_lse,
                key_lse=self.key_lse,
                values=values,
                group_shares=sums,
            ):
                launch.run(query.device)
            return query_lse
        if g2r is None:
            # C V^T needs nothing of the rows: their log-sum-exp rides along, unless P V^T needs it
            self._over_queries(lse=self.key_lse)
        if g2r is not None or sums is not None:
            self._over_keys(lse=row_lse)
            row_lse = None
        if g2r is not None:
            self._over_queries(
                lse=self.key_lse, other_lse=query_lse, weights=query_weights, sums=g2r
            )
        of_votes = {"other_lse": self.key_lse, "weights": key_weights, "sums": r2g}
        of_shares = {"owner_lse": query_lse, "values": values, "shares": sums}
        if r2g is not None and sums is not None and r2g.shape[2] > MAX_LOOPED_ROWS:
            # every block of weight rows would add the shares again
            self._over_keys(**of_shares)
            sums = None
        self._over_keys(lse=row_lse, **of_votes, **(of_shares if sums is not None else {}))
        return query_lse

    def _over_keys(self, **results: Tensor | None) -> None:
        _pass(self.query, self.key, scale=self.scale, bias=self.bias, **results)

    def _over_queries(self, **results: Tensor | None) -> None:
        bias = None if self.bias is None else self.bias.mT
        _pass(self.key, self.query, scale=self.scale, bias=bias, **results)


def _blocks(values: Tensor, sums: Tensor) -> Iterator[Weighted]:
    """Of many groups as many as a program takes."""
    for first in range(0, values.shape[1], MAX_ROW_BLOCK):
        block = slice(first, first + MAX_ROW_BLOCK)
        yield values[:, block], sums[:, :, block]


def _pass(
    owner: Tensor,
    other: Tensor,
    *,
    scale: float,
    bias: Tensor | None,
    lse: Tensor | None = None,
    other_lse: Tensor | None = None,
    weights: Tensor | None = None,
    sums: Tensor | None = None,
    owner_lse: Tensor | None = None,
    values: Tensor | None = None,
    shares: Tensor | None = None,
) -> None:
    """Run what is wanted of one pass: ``lse`` written, the others added into, ``None`` skipped."""
    if lse is None and sums is None and shares is None:
        return
    if sums is None:
        other_lse = weights = None
    elif lse is not None and sums.shape[2] > MAX_ROW_BLOCK:
        # every block of weight rows would compute it again
        _pass(owner, other, scale=scale, bias=bias, lse=lse)
        lse = None
    statistics.plan(
        owner,
        other,
        scale=scale,
        bias=bias,
        lse=lse,
        other_lse=other_lse,
        weights=weights,
        sums=sums,
        owner_lse=owner_lse,
        values=values,
        shares=shares,
    ).run(owner.device)
