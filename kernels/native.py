"""PyTorch's own attention, to the bit, together with the log-sum-exp that it computes anyway."""

import torch
from torch import Tensor


def attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor] | None:
    """What ``scaled_dot_product_attention`` returns, to the bit, with its row log-sum-exp.

    Calls the very operator that PyTorch would dispatch to where that is flash attention, on the CPU
    or on a GPU: the log-sum-exp costs nothing there, and saves a pass over ``Q K^T``.

    Args:
        query: ``[batch, heads, seqlen_q, head_dim]``.
        key: ``[batch, heads, seqlen_k, head_dim]``.
        value: Of the shape of ``key``.
        attn_mask: Additive mask, or ``None``.
        scale: Softmax scale.

    Returns:
        ``(output, query_lse)``, the latter ``[batch, heads, seqlen_q]``, or ``None`` where PyTorch
        would take another route: then call ``scaled_dot_product_attention`` itself. The log-sum-exp
        of a fully masked row is not defined.
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        return None
    choose = getattr(torch, "_fused_sdp_choice", None)
    on_gpu = query.device.type == "cuda"
    if on_gpu:
        name = "_scaled_dot_product_flash_attention"
        # PyTorch pads other head dims before the operator; a mask takes another operator
        suits = attn_mask is None and query.shape[-1] % 8 == 0
    else:
        name = "_scaled_dot_product_flash_attention_for_cpu"
        suits = query.device.type == "cpu"
    operator = getattr(torch.ops.aten, name, None)
    if not suits or choose is None or operator is None:
        return None
    backend = choose(query, key, value, attn_mask, 0.0, False, scale=scale)
    if backend != torch.nn.attention.SDPBackend.FLASH_ATTENTION.value:
        return None
    mask = {} if on_gpu else {"attn_mask": attn_mask}
    output, lse = operator(query, key, value, 0.0, False, scale=scale, **mask)[:2]
    return output, lse
