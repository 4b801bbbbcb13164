"""The public functions: what they promise, what they refuse, and which implementation runs.

Operators are registered with ``torch.library``, so ``torch.compile(fullgraph=True)`` keeps them.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from i2am.kernels import reference, streaming
from i2am.kernels.arguments import (
    check_statistics,
    expanded_bias,
    given_scale,
    prepare,
    statistics_dtype,
)
from i2am.kernels.probes import Over, Probe, as_weights, checked, packed, unpacked
from i2am.kernels.types import AttentionStatistics, Impl


def accumulate(
    query: Tensor,
    key: Tensor,
    probes: Sequence[Probe],
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    normaliser: Tensor | None = None,
    impl: Impl | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add what probes read of both softmaxes of ``S = scale * query @ key^T + bias``, in place.

    ``P`` (softmax over the keys) is what the model uses, ``C`` (softmax over the queries) is what
    reference-to-generated attribution needs. Inference only, no gradient. fp32 statistics for
    fp16, bf16 and fp32 inputs, fp64 for fp64. Deterministic to the bit for equal inputs,
    on a CPU with one number of threads.

    Args:
        query: ``[batch, heads, seqlen_q, head_dim]``, any strides.
        key: ``[batch, heads, seqlen_k, head_dim]``, dtype and device of ``query``.
        probes: What is added where, see :class:`Probe`; all of them together cost little more than
            the most expensive one.
        scale: Softmax scale, default ``head_dim ** -0.5``.
        bias: Additive mask broadcastable to ``[batch, heads, seqlen_q, seqlen_k]``; a bool mask is
            True where attention is allowed; the lowest numbers of a dtype count as ``-inf``. Fully
            masked rows and columns contribute 0.
        normaliser: Natural log-sum-exp over the keys, ``[batch, heads, seqlen_q]``, of the whole
            sequence where ``key`` is a part of it: ``P = exp(S - normaliser)``, and 0 where it is
            ``-inf``. One of exactly these keys saves a pass. It is taken as it is: nothing finds
            out that a wrong one was given. ``C`` does not depend on it.
        impl: ``"fused"``, ``"streaming"``, ``"reference"``; default fused on CUDA (compute
            capability 8.0 or newer), else streaming.

    Returns:
        ``(query_lse, key_lse)``: natural log-sum-exps over the keys (``normaliser`` itself where
        given) and over the queries, ``[batch, heads, seqlen_q]`` and ``[batch, heads, seqlen_k]``,
        fp32 (fp64 with fp64 inputs).

    Raises:
        ValueError: A shape, dtype or device does not fit, a probe is of no supported kind, or
            ``impl`` is unknown.
        RuntimeError: ``impl="fused"`` without a GPU or Triton's interpreter.
        NotImplementedError: A gradient is asked for.

    Example:
        >>> query, key = torch.randn(1, 8, 48, 40), torch.randn(1, 8, 13, 40)
        >>> shares = torch.zeros(1, 8, 2, 48)
        >>> groups = torch.arange(13)[None, None] % 2 == torch.arange(2)[:, None]
        >>> lse = accumulate(query, key, [Probe("keys", shares, right=groups)])
        >>> bool(shares.sum(2).allclose(torch.ones(())))
        True
    """
    probes = list(probes)
    sides = [side for probe in probes for side in (probe.left, probe.right)]
    others = [*(side for side in sides if isinstance(side, Tensor)), *(p.into for p in probes)]
    chosen = prepare(query, key, impl, others=(bias, normaliser, *others))
    bias = expanded_bias(bias, query, key)
    check_statistics("normaliser", normaliser, tuple(query.shape[:3]), query)
    return _accumulated(
        query, key, bias, normaliser, checked(probes, query, key), given_scale(scale, query), chosen
    )


def attention_statistics(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    query_weights: Tensor | None = None,
    key_weights: Tensor | None = None,
    impl: Impl | str | None = None,
) -> AttentionStatistics:
    """Weighted sums of both softmaxes, see :func:`accumulate`, by name.

    Args:
        query: As in :func:`accumulate`, like the arguments not listed here.
        key: ``[batch, heads, seqlen_k, head_dim]``.
        scale: Softmax scale.
        bias: Additive or bool mask.
        query_weights: ``W``, ``[batch or 1, rows, seqlen_q]``; default one row of ``1 / seqlen_q``.
        key_weights: ``u``, ``[seqlen_k]``, ``[batch, seqlen_k]`` or, for several vote vectors in
            one sweep, ``[batch or 1, votes, seqlen_k]``; default uniform ``1 / seqlen_k``. Zeros
            drop tokens from the vote, not from the softmax.
        impl: Which implementation.

    Returns:
        ``(r2g, g2r, query_lse, key_lse)``: see :class:`AttentionStatistics`.

    Raises:
        ValueError: A shape, dtype or device does not fit, or ``impl`` is unknown.
        RuntimeError: ``impl="fused"`` without a GPU or Triton's interpreter.
        NotImplementedError: A gradient is asked for.

    Example:
        >>> query, key = torch.randn(1, 8, 48, 40), torch.randn(1, 8, 13, 40)
        >>> attention_statistics(query, key).g2r.shape
        torch.Size([1, 8, 1, 13])
    """
    chosen = prepare(query, key, impl, others=(bias, query_weights, key_weights))
    bias = expanded_bias(bias, query, key)
    rows = _query_weights(query_weights, query)
    votes = _key_weights(key_weights, key)
    batch, heads, seqlen_q, _ = query.shape
    r2g = rows.new_zeros((batch, heads, votes.shape[1], seqlen_q))
    g2r = rows.new_zeros((batch, heads, rows.shape[1], key.shape[2]))
    probes = [Probe(Over.KEYS, g2r, left=rows), Probe(Over.QUERIES, r2g, right=votes)]
    query_lse, key_lse = _accumulated(
        query, key, bias, None, probes, given_scale(scale, query), chosen
    )
    with_votes = key_weights is not None and key_weights.ndim == 3
    return AttentionStatistics(r2g if with_votes else r2g[:, :, 0], g2r, query_lse, key_lse)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    impl: Impl | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain attention with its row log-sum-exp, which saves the statistics a pass.

    Args:
        query: As in :func:`accumulate`, like all other arguments.
        key: ``[batch, heads, seqlen_k, head_dim]``.
        value: ``[batch, heads, seqlen_k, head_dim]``, dtype and device of ``query``.
        scale: Softmax scale.
        bias: Additive or bool mask.
        impl: Which implementation.

    Returns:
        ``(output, query_lse)``: ``[batch, heads, seqlen_q, head_dim]`` in the dtype of ``query``,
        whose fully masked rows are 0, and ``[batch, heads, seqlen_q]``, fp32 or fp64.

    Raises:
        ValueError: As :func:`accumulate`, or ``value`` does not fit ``key``.
        RuntimeError: ``impl="fused"`` without a GPU or Triton's interpreter.
        NotImplementedError: A gradient is asked for.
    """
    chosen = prepare(query, key, impl, value, others=(bias,))
    bias = expanded_bias(bias, query, key)
    result: tuple[Tensor, Tensor] = torch.ops.i2am.attention(
        query, key, value, bias, given_scale(scale, query), chosen.value
    )
    return result


def module_of(impl: Impl) -> ModuleType:
    """The module with ``accumulate`` and ``attention``; triton is imported only when asked for."""
    if impl is Impl.FUSED:
        from i2am.kernels import fused

        return fused
    return streaming if impl is Impl.STREAMING else reference


def _accumulated(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    normaliser: Tensor | None,
    probes: list[Probe],
    scale: float,
    impl: Impl,
) -> tuple[Tensor, Tensor]:
    """The operator on checked arguments."""
    sums, sides, plan = packed(probes)
    row_lse, key_lse = torch.ops.i2am.accumulate(
        query, key, bias, normaliser, sums, sides, plan, scale, impl.value
    )
    return (row_lse if normaliser is None else normaliser), key_lse


@torch.library.custom_op("i2am::accumulate", mutates_args=("sums",))
def _accumulate(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    normaliser: Tensor | None,
    sums: Sequence[Tensor],
    sides: Sequence[Tensor],
    plan: Sequence[int],
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    # statistics are fp32 also where the model runs under autocast
    with torch.autocast(query.device.type, enabled=False):
        row_lse, key_lse = module_of(Impl(impl)).accumulate(
            query,
            key,
            unpacked(sums, sides, plan),
            scale=scale,
            bias=bias,
            normaliser=normaliser,
        )
    # an operator must not return one of its inputs
    return row_lse if normaliser is None else row_lse.new_empty(0), key_lse


@_accumulate.register_fake
def _(query, key, bias, normaliser, sums, sides, plan, scale, impl):  # type: ignore[no-untyped-def]
    statistics = statistics_dtype(query)
    return (
        query.new_empty(query.shape[:3] if normaliser is None else 0, dtype=statistics),
        key.new_empty(key.shape[:3], dtype=statistics),
    )


@torch.library.custom_op("i2am::attention", mutates_args=())
def _attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, impl: str
) -> tuple[Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        output, lse = module_of(Impl(impl)).attention(query, key, value, scale=scale, bias=bias)
    # the layout is part of the operator's contract: fake and real strides must agree
    return output.contiguous(), lse.contiguous()


@_attention.register_fake
def _(query, key, value, bias, scale, impl):  # type: ignore[no-untyped-def]
    statistics = statistics_dtype(query)
    return (
        query.new_empty((*query.shape[:3], value.shape[3])),
        query.new_empty(query.shape[:3], dtype=statistics),
    )


def _query_weights(weights: Tensor | None, query: Tensor) -> Tensor:
    if weights is None:
        return _uniform(query)
    return as_weights("query_weights", weights, query, query.shape[2], "rows")


def _key_weights(weights: Tensor | None, key: Tensor) -> Tensor:
    batch, _, seqlen_k, _ = key.shape
    if weights is None:
        return _uniform(key)
    full = weights.unsqueeze(-2) if weights.ndim in (1, 2) else weights
    full = full[None] if full.ndim == 2 else full
    if full.ndim != 3 or full.shape[0] not in (1, batch) or full.shape[2] != seqlen_k:
        raise ValueError(
            f"key_weights must be [{seqlen_k}], [{batch}, {seqlen_k}] or [{batch} or 1, votes, "
            f"{seqlen_k}], got {tuple(weights.shape)}"
        )
    return as_weights("key_weights", full, key, seqlen_k, "votes")


def _uniform(tokens: Tensor) -> Tensor:
    batch, _, seqlen, _ = tokens.shape
    weights = tokens.new_full((1, 1, seqlen), 1.0 / seqlen, dtype=statistics_dtype(tokens))
    return weights.expand(batch, 1, seqlen)
