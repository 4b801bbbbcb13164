"""One attention call, given to the kernels: some of its keys, or weights that differ by head."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from i2am.kernels import Probe, accumulate

Tokens = slice | Tensor
"""Which tokens of a sequence."""


def accumulate_call(
    query: Tensor,
    key: Tensor,
    probes: list[Probe],
    *,
    keys: Tokens,
    by_head: bool,
    reference: Tokens,
    pooled: list[Probe],
    alone: list[Probe],
    bias: Tensor | None,
    normaliser: Tensor | None,
    **options: Any,
) -> Tensor:
    """Add what probes read of some keys of a call.

    Args:
        query: ``[batch, heads, seqlen_q, head_dim]``.
        key: ``[batch, heads, seqlen_k, head_dim]``: all keys of the call.
        probes: Of the keys that are read.
        keys: Which those are.
        by_head: Whether weights differ by head.
        reference: Which of them are the reference tokens.
        pooled: Probes of the reference tokens with poolings.
        alone: Probes of them under a softmax over them alone.
        bias: Additive or bool mask.
        normaliser: The row log-sum-exp over all keys, where it is known.
        options: What else ``accumulate`` takes.

    Returns:
        The row log-sum-exp over all keys, ``[batch, heads, seqlen_q]``.
    """
    if not _is_every(keys):
        if normaliser is None:  # the softmax over all keys is what the model takes
            normaliser, _ = accumulate(query, key, [], bias=bias, **options)
        key, bias = key[:, :, keys], _columns(bias, keys)
    every = _is_every(reference)
    if by_head:
        lse = _accumulate_by_head(query, key, probes, bias=bias, normaliser=normaliser, **options)
    else:
        if every:
            probes, pooled = probes + pooled, []
        lse, _ = accumulate(query, key, probes, bias=bias, normaliser=normaliser, **options)
    if not every and (pooled or alone):
        key, bias = key[:, :, reference], _columns(bias, reference)
    if pooled:
        accumulate(query, key, pooled, bias=bias, normaliser=lse, **options)
    if alone:
        accumulate(query, key, alone, bias=bias, **options)
    return lse


def _accumulate_by_head(
    query: Tensor,
    key: Tensor,
    probes: Sequence[Probe],
    *,
    bias: Tensor | None,
    normaliser: Tensor | None,
    **options: Any,
) -> Tensor:
    """``accumulate`` for weights over keys that differ by head, in the same sweeps.

    Heads take the place of a batch, one row after the other, so that all tensors are views.

    Args:
        query: ``[batch, heads, seqlen_q, head_dim]``.
        key: ``[batch, heads, seqlen_k, head_dim]``.
        probes: Those with weights on one side, ``[batch or 1, rows, tokens]`` or ``[batch, heads,
            groups, seqlen_k]``.
        bias: Additive or bool mask.
        normaliser: ``[batch, heads, seqlen_q]`` or ``None``.
        options: What else ``accumulate`` takes.

    Returns:
        The row log-sum-exp, ``[batch, heads, seqlen_q]``.
    """
    if bias is not None:
        bias = bias[(None,) * (4 - bias.ndim)]
    found = []
    for row in range(len(query)):

        def of_row(weights: Any, row: int = row) -> Any:
            if weights is None:
                return None
            own = weights[row if len(weights) > 1 else 0]
            return own if own.ndim == 3 else own[None]

        lse, _ = accumulate(
            query[row, :, None],
            key[row, :, None],
            [
                replace(
                    probe,
                    into=probe.into[row, :, None],
                    left=of_row(probe.left),
                    right=of_row(probe.right),
                )
                for probe in probes
            ],
            bias=None if bias is None else bias[row if len(bias) > 1 else 0][:, None],
            normaliser=None if normaliser is None else normaliser[row, :, None],
            **options,
        )
        found.append(lse[:, 0])
    return torch.stack(found) if normaliser is None else normaliser


def _is_every(tokens: Tokens) -> bool:
    return isinstance(tokens, slice) and tokens == slice(None)


def _columns(bias: Tensor | None, keys: Tokens) -> Tensor | None:
    """The columns of a mask that belong to some keys."""
    return bias if bias is None or not bias.ndim or bias.shape[-1] == 1 else bias[..., keys]


def softmax_over_queries(
    query: Tensor, key: Tensor, scale: float | None, bias: Tensor | None
) -> Tensor:
    """``C`` ``[batch, heads, seqlen_q, seqlen_k]`` in the published order of fp32 operations."""
    compute = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(compute) @ key.to(compute).mT
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None and bias.dtype == torch.bool:
        scores = scores.masked_fill(~bias, -torch.inf)
    elif bias is not None:
        scores = scores + bias
    # a key that no query may attend to spreads nothing: its softmax would be NaN
    unseen = scores.isneginf().all(-2, keepdim=True)
    return scores.softmax(-2).masked_fill(unseen, 0)
