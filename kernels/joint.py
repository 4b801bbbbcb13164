"""Joint statistics: both softmaxes of a call between cells of tokens, the whole small matrix."""

import torch
from torch import Tensor

from i2am.kernels.arguments import (
    check_statistics,
    check_sums,
    expanded_bias,
    given_scale,
    prepare,
)
from i2am.kernels.pooling import Pooling
from i2am.kernels.types import Impl


def accumulate_joint_statistics(
    query: Tensor,
    key: Tensor,
    *,
    query_lse: Tensor,
    key_lse: Tensor,
    g2r: Tensor,
    r2g: Tensor,
    g2r_per_head: Tensor | None = None,
    r2g_per_head: Tensor | None = None,
    query_pooling: Pooling | None = None,
    key_pooling: Pooling | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    impl: Impl | str | None = None,
) -> None:
    """Add ``W P V^T`` and ``W C V^T`` into given accumulators, in place.

    ``W`` and ``V`` are the poolings of the queries and of the keys, ``P`` and ``C`` the softmaxes
    of :func:`~i2am.kernels.attention_statistics`, whose log-sum-exps are given: the keys may
    therefore be some of those that the model attended to. Inference only; deterministic to the bit,
    on a CPU with one number of threads.

    Args:
        query: ``[batch, heads, seqlen_q, head_dim]``, any strides.
        key: ``[batch, heads, seqlen_k, head_dim]``, dtype and device of ``query``.
        query_lse: ``[batch, heads, seqlen_q]`` over all keys of the call, fp32 (fp64 with fp64
            inputs).
        key_lse: ``[batch, heads, seqlen_k]`` over the queries, likewise.
        g2r: Mean over the heads of ``W P V^T``: ``[batch, cells of queries, cells of keys]``, fp32
            (fp64 with fp64 inputs), any strides that let no two elements share memory.
        r2g: Mean over the heads of ``W C V^T``, likewise.
        g2r_per_head: ``W P V^T`` of every head, ``[batch, heads, cells of queries, cells of
            keys]``; ``None`` skips it.
        r2g_per_head: ``W C V^T`` of every head, likewise.
        query_pooling: ``W``; ``None`` for a cell per query.
        key_pooling: ``V``; ``None`` for a cell per key.
        scale: Softmax scale, default ``head_dim ** -0.5``.
        bias: Additive or bool mask, as in :func:`~i2am.kernels.attention_statistics`.
        impl: ``"fused"``, ``"streaming"``, ``"reference"``; default fused on CUDA (compute
            capability 8.0 or newer), else streaming.

    Raises:
        ValueError: A shape, dtype or device does not fit, or ``impl`` is unknown.
        RuntimeError: ``impl="fused"`` without a GPU or Triton's interpreter.
        NotImplementedError: A gradient is asked for.
    """
    sums = (g2r, r2g, g2r_per_head, r2g_per_head)
    chosen = prepare(query, key, impl, others=(bias, query_lse, key_lse, *sums))
    bias = expanded_bias(bias, query, key)
    batch, heads, seqlen_q, _ = query.shape
    seqlen_k = key.shape[2]
    check_statistics("query_lse", query_lse, (batch, heads, seqlen_q), query)
    check_statistics("key_lse", key_lse, (batch, heads, seqlen_k), query)
    cells = (
        _cells("query_pooling", query_pooling, seqlen_q, "queries"),
        _cells("key_pooling", key_pooling, seqlen_k, "keys"),
    )
    check_sums("g2r", g2r, (batch, *cells), query)
    check_sums("r2g", r2g, (batch, *cells), query)
    check_sums("g2r_per_head", g2r_per_head, (batch, heads, *cells), query)
    check_sums("r2g_per_head", r2g_per_head, (batch, heads, *cells), query)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        _function(chosen)(
            query,
            key,
            scale=given_scale(scale, query),
            bias=bias,
            query_lse=query_lse,
            key_lse=key_lse,
            query_pooling=None if query_pooling is None else query_pooling.to(query.device),
            key_pooling=None if key_pooling is None else key_pooling.to(query.device),
            g2r=(g2r, g2r_per_head),
            r2g=(r2g, r2g_per_head),
        )


def _function(impl: Impl):  # type: ignore[no-untyped-def]
    if impl is Impl.FUSED:
        from i2am.kernels.fused.joint import accumulate_joint
    elif impl is Impl.STREAMING:
        from i2am.kernels.joint_streaming import accumulate_joint
    else:
        from i2am.kernels.reference import accumulate_joint
    return accumulate_joint


def _cells(name: str, pooling: Pooling | None, tokens: int, what: str) -> int:
    if pooling is None:
        return tokens
    if pooling.size != tokens:
        raise ValueError(f"{name} must pool the {tokens} {what}, got one of {pooling.size} tokens")
    return pooling.cells
