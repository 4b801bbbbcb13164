"""How a recorded layer attends: by the model's own call, or by the call that also records best.

Either hands over the row log-sum-exp where it has it: it saves the recording a pass over QK^T.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from i2am.kernels import Impl
from i2am.kernels import attention as kernel_attention
from i2am.kernels.native import attention_with_lse

Attend = Callable[..., tuple[Tensor, Tensor | None]]
"""``attend(query, key, value, attn_mask=None, *, scale=None) -> (output, query_lse or None)``"""

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
) -> tuple[Tensor, Tensor | None]:
    """``scaled_dot_product_attention`` to the bit; the log-sum-exp where PyTorch yields it."""
    plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled(query.device.type)
    if plain and not torch.compiler.is_compiling():
        with_lse = attention_with_lse(query, key, value, attn_mask=attn_mask, scale=scale)
        if with_lse is not None:
            return with_lse
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, scale=scale)
    return output, None


def _attend_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    impl: Impl | str | None,
) -> tuple[Tensor, Tensor | None]:
    return kernel_attention(query, key, value, bias=attn_mask, scale=scale, impl=impl)
