"""PyTorch's own attention, to the bit, together with the log-sum-exp that it computes anyway."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], tuple[Tensor, ...]]
"""``attend(query, key, value, attn_mask, scale) -> (output, log-sum-exp, ...)``"""


def attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor] | None:
    """What ``scaled_dot_product_attention`` returns, to the bit, with its row log-sum-exp.

    Calls the very operator that PyTorch would dispatch to, on the CPU or on a GPU: the log-sum-exp
    costs nothing there, and saves a pass over ``Q K^T``. Whatever goes wrong is left to PyTorch.

    Args:
        query: ``[batch, heads, seqlen_q, head_dim]``.
        key: ``[batch, heads, seqlen_k, head_dim]``.
        value: Of the shape of ``key``.
        attn_mask: Additive mask, or ``None``.
        scale: Softmax scale.

    Returns:
        ``(output, query_lse)``, the latter ``[batch, heads, seqlen_q]``, or ``None`` where PyTorch
        would take another route: then call ``scaled_dot_product_attention`` itself. The log-sum-exp
        of a fully masked row is some finite number or ``-inf``.
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # how it is made additive depends on the backend and on PyTorch's version
        return None
    try:
        backend = torch._fused_sdp_choice(query, key, value, attn_mask, 0.0, False, scale=scale)
        attend = ADMITTED.get((query.device.type, backend))
        if attend is None:
            return None
        output, lse = attend(query, key, value, attn_mask, scale)[:2]
        # cuDNN adds an axis of 1, memory-efficient attention rows up to a multiple of 32
        lse = lse.flatten(2).narrow(2, 0, query.shape[2])
    except Exception:
        return None
    expected = torch.promote_types(query.dtype, torch.float32)
    if lse.shape != query.shape[:3] or lse.dtype != expected:
        return None
    if attn_mask is not None:
        # a fully masked row; -inf is what every implementation knows how to take
        nothing = float("-inf")
        lse = lse.nan_to_num(nan=nothing, posinf=nothing, neginf=nothing)
    return output, lse


def _flash_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None
) -> tuple[Tensor, ...]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=attn_mask, scale=scale
    )


def _flash(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None
) -> tuple[Tensor, ...]:
    if attn_mask is not None or query.shape[-1] % 8:
        raise NotImplementedError("the operator takes no mask, and PyTorch pads other head dims")
    return torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, False, False, scale=scale
    )


def _cudnn(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None
) -> tuple[Tensor, ...]:
    return torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, attn_mask, True, 0.0, False, False, scale=scale
    )


def _memory_efficient(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None
) -> tuple[Tensor, ...]:
    if attn_mask is not None:
        # the operator wants rows that start at multiples of 16, as PyTorch lays them out for it
        keys = key.shape[2]
        rows = attn_mask.expand(*attn_mask.shape[:-1], keys)
        padded = F.pad(rows, (0, -keys % 16)).contiguous()
        attn_mask = padded.narrow(-1, 0, keys).expand(*query.shape[:3], keys)
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, 0.0, False, scale=scale
    )


ADMITTED: dict[tuple[str, int], Attend] = {
    ("cpu", SDPBackend.FLASH_ATTENTION.value): _flash_on_cpu,
    ("cuda", SDPBackend.FLASH_ATTENTION.value): _flash,
    ("cuda", SDPBackend.CUDNN_ATTENTION.value): _cudnn,
    ("cuda", SDPBackend.EFFICIENT_ATTENTION.value): _memory_efficient,
}
"""Backends whose output with a log-sum-exp is the one without it, to the bit, by device.

So tested on x86-64 CPUs and on an H100 with torch 2.11 (tests/kernels/test_native.py).
"""
