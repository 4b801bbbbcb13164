"""How a recorded layer attends: by the model's own call, or by the call that also records best.

Either hands over the row log-sum-exp where it has it: it saves the recording a pass over QK^T.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from i2am.kernels import Impl
from i2am.kernels import attention as kernel_attention
from i2am.kernels.native import attention_with_lse

Attended = tuple[Tensor, Tensor]
"""``(output, query_lse)``"""

Attend = Callable[..., Attended | None]
"""``attend(query, key, value, attn_mask=None, *, scale=None)``; ``None`` where the model's own call
has to be made."""

ATTACH = ("beside", "fused")


def attend_by(attach: str, impl: Impl | str | None) -> Attend:
    """The way to attend.

    Args:
        attach: ``"beside"`` leaves the model's call as it is, so that the image stays the same to
            the bit; ``"fused"`` replaces it by the kernels' own forward.
        impl: Implementation of the latter.

    Raises:
        ValueError: ``attach`` is unknown.
    """
    if attach not in ATTACH:
        raise ValueError(f"attach must be one of {', '.join(ATTACH)}, got {attach!r}")
    return attend_beside if attach == "beside" else partial(_attend_fused, impl=impl)


def attend_beside(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Attended | None:
    """``scaled_dot_product_attention`` to the bit, where PyTorch yields its log-sum-exp."""
    plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled(query.device.type)
    if not plain or torch.compiler.is_compiling():
        return None
    return attention_with_lse(query, key, value, attn_mask=attn_mask, scale=scale)


def _attend_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    impl: Impl | str | None,
) -> Attended:
    return kernel_attention(query, key, value, bias=attn_mask, scale=scale, impl=impl)


def attend_guarded(
    guard: AbstractContextManager[Any],
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Attended | None:
    """``attend`` inside a guard: also ``None`` where it fails."""
    if torch.compiler.is_compiling():  # a graph holds the call, not what is around it
        return attend(query, key, value, attn_mask, scale=scale)
    with guard:
        return attend(query, key, value, attn_mask, scale=scale)
    return None
