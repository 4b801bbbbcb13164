"""The public functions: what they promise, what they refuse, and which implementation runs.

Operators are registered with ``torch.library``, so ``torch.compile(fullgraph=True)`` keeps them.
"""

from types import ModuleType

import torch
from torch import Tensor

from i2am.kernels import reference, streaming
from i2am.kernels.arguments import (
    check_statistics,
    check_sums,
    expanded_bias,
    given_scale,
    prepare,
)
from i2am.kernels.types import AttentionStatistics, Impl


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
    """Weighted sums of both softmaxes of ``S = scale * query @ key^T + bias``.

    ``P`` (softmax over the keys) is what the model uses, ``C`` (softmax over the queries) is what
    reference-to-generated attribution needs. Inference only, no gradient. fp32 statistics for
    fp16, bf16 and fp32 inputs, fp64 for fp64. Deterministic to the bit for equal inputs,
    on a CPU with one number of threads.

    Args:
        query: ``[batch, heads, seqlen_q, head_dim]``, any strides.
        key: ``[batch, heads, seqlen_k, head_dim]``, dtype and device of ``query``.
        scale: Softmax scale, default ``head_dim ** -0.5``.
        bias: Additive mask broadcastable to ``[batch, heads, seqlen_q, seqlen_k]``; a bool mask is
            True where attention is allowed; the lowest numbers of a dtype count as ``-inf``. Fully
            masked rows and columns contribute 0.
        query_weights: ``W``, ``[batch or 1, rows, seqlen_q]``; default one row of ``1 / seqlen_q``.
        key_weights: ``u``, ``[seqlen_k]``, ``[batch, seqlen_k]`` or, for several vote vectors in
            one sweep, ``[batch or 1, votes, seqlen_k]``; default uniform ``1 / seqlen_k``. Zeros
            drop tokens from the vote, not from the softmax.
        impl: ``"fused"``, ``"streaming"``, ``"reference"``; default fused on CUDA (compute
            capability 8.0 or newer), else streaming.

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
    r2g, g2r = _empty_sums(query, key, rows, votes)
    query_lse, key_lse = torch.ops.i2am.accumulate(
        query, key, bias, rows, votes, None, r2g, g2r, given_scale(scale, query), chosen.value
    )
    return _named(r2g, g2r, query_lse, key_lse, key_weights)


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
        query: As in :func:`attention_statistics`, like all other arguments.
        key: ``[batch, heads, seqlen_k, head_dim]``.
        value: ``[batch, heads, seqlen_k, head_dim]``, dtype and device of ``query``.
        scale: Softmax scale.
        bias: Additive or bool mask.
        impl: Which implementation.

    Returns:
        ``(output, query_lse)``: ``[batch, heads, seqlen_q, head_dim]`` in the dtype of ``query``,
        whose fully masked rows are 0, and ``[batch, heads, seqlen_q]``, fp32 or fp64.

    Raises:
        ValueError: As :func:`attention_statistics`, or ``value`` does not fit ``key``.
        RuntimeError: ``impl="fused"`` without a GPU or Triton's interpreter.
        NotImplementedError: A gradient is asked for.
    """
    chosen = prepare(query, key, impl, value, others=(bias,))
    bias = expanded_bias(bias, query, key)
    result: tuple[Tensor, Tensor] = torch.ops.i2am.attention(
        query, key, value, bias, given_scale(scale, query), chosen.value
    )
    return result


def attention_with_statistics(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    query_weights: Tensor | None = None,
    key_weights: Tensor | None = None,
    impl: Impl | str | None = None,
) -> tuple[Tensor, AttentionStatistics]:
    """The attention output together with its statistics; the row log-sum-exp is computed once.

    Args:
        query: As in :func:`attention_statistics`, like all other arguments.
        key: ``[batch, heads, seqlen_k, head_dim]``.
        value: ``[batch, heads, seqlen_k, head_dim]``, dtype and device of ``query``.
        scale: Softmax scale.
        bias: Additive or bool mask.
        query_weights: ``W``.
        key_weights: ``u``.
        impl: Which implementation.

    Returns:
        ``(output, statistics)``; ``output`` is ``[batch, heads, seqlen_q, head_dim]`` in the dtype
        of ``query``; its fully masked rows are 0.

    Raises:
        ValueError: As :func:`attention_statistics`, or ``value`` does not fit ``key``.
        RuntimeError: ``impl="fused"`` without a GPU or Triton's interpreter.
        NotImplementedError: A gradient is asked for.
    """
    chosen = prepare(query, key, impl, value, others=(bias, query_weights, key_weights))
    bias = expanded_bias(bias, query, key)
    rows = _query_weights(query_weights, query)
    votes = _key_weights(key_weights, key)
    r2g, g2r = _empty_sums(query, key, rows, votes)
    softmax_scale = given_scale(scale, query)
    output, lse = torch.ops.i2am.attention(query, key, value, bias, softmax_scale, chosen.value)
    query_lse, key_lse = torch.ops.i2am.accumulate(
        query, key, bias, rows, votes, lse, r2g, g2r, softmax_scale, chosen.value
    )
    return output, _named(r2g, g2r, _own_lse(query_lse, lse), key_lse, key_weights)


def accumulate_attention_statistics(
    query: Tensor,
    key: Tensor,
    *,
    r2g: Tensor | None = None,
    g2r: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    query_weights: Tensor | None = None,
    key_weights: Tensor | None = None,
    query_lse: Tensor | None = None,
    impl: Impl | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add the sums of :func:`attention_statistics` into given accumulators, in place.

    Args:
        query: As in :func:`attention_statistics`, like the arguments not listed here.
        key: ``[batch, heads, seqlen_k, head_dim]``.
        r2g: ``[batch, heads, votes, seqlen_q]``, fp32 (fp64 with fp64 inputs), any strides; the
            votes axis is always there. No two elements may share memory. ``None`` skips the
            direction.
        g2r: ``[batch, heads, rows, seqlen_k]``, likewise.
        scale: Softmax scale.
        bias: Additive or bool mask.
        query_weights: ``W``.
        key_weights: ``u``.
        query_lse: Natural log-sum-exp over the keys ``[batch, heads, seqlen_q]`` where the caller
            has it, of exactly these inputs: it saves one pass.
        impl: Which implementation.

    Returns:
        ``(query_lse, key_lse)``, ``[batch, heads, seqlen_q]`` and ``[batch, heads, seqlen_k]``,
        fp32 (fp64 with fp64 inputs).

    Raises:
        ValueError: As :func:`attention_statistics`, or an accumulator does not fit.
        RuntimeError: ``impl="fused"`` without a GPU or Triton's interpreter.
        NotImplementedError: A gradient is asked for.
    """
    chosen = prepare(query, key, impl, others=(bias, query_weights, key_weights, r2g, g2r))
    bias = expanded_bias(bias, query, key)
    rows = _query_weights(query_weights, query)
    votes = _key_weights(key_weights, key)
    batch, heads, seqlen_q, _ = query.shape
    check_sums("r2g", r2g, (batch, heads, votes.shape[1], seqlen_q), query)
    check_sums("g2r", g2r, (batch, heads, rows.shape[1], key.shape[2]), query)
    check_statistics("query_lse", query_lse, (batch, heads, seqlen_q), query)
    row_lse, key_lse = torch.ops.i2am.accumulate(
        query, key, bias, rows, votes, query_lse, r2g, g2r, given_scale(scale, query), chosen.value
    )
    return _own_lse(row_lse, query_lse), key_lse


def module_of(impl: Impl) -> ModuleType:
    """The module with ``accumulate`` and ``attention``; triton is imported only when asked for."""
    if impl is Impl.FUSED:
        from i2am.kernels import fused

        return fused
    return streaming if impl is Impl.STREAMING else reference


@torch.library.custom_op("i2am::accumulate", mutates_args=("r2g", "g2r"))
def _accumulate(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    query_weights: Tensor,
    key_weights: Tensor,
    query_lse: Tensor | None,
    r2g: Tensor | None,
    g2r: Tensor | None,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    if g2r is not None and key.shape[2] == 1 and bias is None and impl != Impl.REFERENCE:
        # a single key takes all of every row: P is 1
        g2r += query_weights.to(g2r.dtype).sum(-1)[:, None, :, None]
        g2r = None
    # statistics are fp32 also where the model runs under autocast
    with torch.autocast(query.device.type, enabled=False):
        row_lse, key_lse = module_of(Impl(impl)).accumulate(
            query,
            key,
            scale=scale,
            bias=bias,
            query_weights=query_weights,
            key_weights=key_weights,
            r2g=r2g,
            g2r=g2r,
            query_lse=query_lse,
        )
    if query_lse is not None and impl == Impl.FUSED:
        # an operator must not return one of its inputs: _own_lse puts it in place of this
        row_lse = query_lse.new_empty(0)
    return row_lse, key_lse


@_accumulate.register_fake
def _(query, key, bias, query_weights, key_weights, query_lse, r2g, g2r, scale, impl):  # type: ignore[no-untyped-def]
    statistics = torch.promote_types(query.dtype, torch.float32)
    given = query_lse is not None and impl == Impl.FUSED
    return (
        query.new_empty(0 if given else query.shape[:3], dtype=statistics),
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
    statistics = torch.promote_types(query.dtype, torch.float32)
    return (
        query.new_empty((*query.shape[:3], value.shape[3])),
        query.new_empty(query.shape[:3], dtype=statistics),
    )


def _query_weights(weights: Tensor | None, query: Tensor) -> Tensor:
    batch, _, seqlen_q, _ = query.shape
    if weights is None:
        return _uniform(query).expand(batch, 1, seqlen_q)
    if weights.ndim != 3 or weights.shape[0] not in (1, batch) or weights.shape[2] != seqlen_q:
        raise ValueError(
            f"query_weights must be [{batch} or 1, rows, {seqlen_q}], got {tuple(weights.shape)}"
        )
    return _as_statistics(weights, query).expand(batch, -1, -1)


def _key_weights(weights: Tensor | None, key: Tensor) -> Tensor:
    batch, _, seqlen_k, _ = key.shape
    if weights is None:
        return _uniform(key).expand(batch, 1, seqlen_k)
    full = weights.unsqueeze(-2) if weights.ndim in (1, 2) else weights
    full = full[None] if full.ndim == 2 else full
    if full.ndim != 3 or full.shape[0] not in (1, batch) or full.shape[2] != seqlen_k:
        raise ValueError(
            f"key_weights must be [{seqlen_k}], [{batch}, {seqlen_k}] or [{batch} or 1, votes, "
            f"{seqlen_k}], got {tuple(weights.shape)}"
        )
    return _as_statistics(full, key).expand(batch, -1, -1)


def _uniform(tokens: Tensor) -> Tensor:
    seqlen = tokens.shape[2]
    statistics = torch.promote_types(tokens.dtype, torch.float32)
    return tokens.new_full((1, 1, seqlen), 1.0 / seqlen, dtype=statistics)


def _as_statistics(weights: Tensor, like: Tensor) -> Tensor:
    return weights.to(like.device, torch.promote_types(like.dtype, torch.float32))


def _empty_sums(query: Tensor, key: Tensor, rows: Tensor, votes: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, seqlen_q, _ = query.shape
    statistics = torch.promote_types(query.dtype, torch.float32)
    return (
        query.new_zeros((batch, heads, votes.shape[1], seqlen_q), dtype=statistics),
        query.new_zeros((batch, heads, rows.shape[1], key.shape[2]), dtype=statistics),
    )


def _own_lse(returned: Tensor, given: Tensor | None) -> Tensor:
    """What the operator returned, or what it was given and took as it is."""
    return given if given is not None and returned.ndim == 1 else returned


def _named(
    r2g: Tensor, g2r: Tensor, query_lse: Tensor, key_lse: Tensor, key_weights: Tensor | None
) -> AttentionStatistics:
    with_votes = key_weights is not None and key_weights.ndim == 3
    return AttentionStatistics(r2g if with_votes else r2g[:, :, 0], g2r, query_lse, key_lse)
