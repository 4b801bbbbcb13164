"""How a recorded layer attends: by the model's own call, or by the call that also records best.

Either hands over the row log-sum-exp where it has it: it saves the recording a pass over QK^T.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from i2am.adapters.attention.sites import Record, wanted
from i2am.kernels import Impl
from i2am.kernels import attention as kernel_attention
from i2am.kernels.native import attention_with_lse

Attended = tuple[Tensor, Tensor]
"""``(output, query_lse)``"""

Attend = Callable[..., Attended | None]
"""``attend(query, key, value, attn_mask=None, *, scale=None)``; ``None`` where the model's own call
has to be made."""

ATTACH = ("beside", "fused")

_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
# arguments of calls that only PyTorch's own function makes
_PYTORCH_ALONE = ("dropout_p", "is_causal", "enable_gqa")


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
    # others (SageAttention) are put in the place of PyTorch's function
    if F.scaled_dot_product_attention is not torch._C._nn.scaled_dot_product_attention:
        return None
    if query.is_meta:
        return None
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


def attend_given(
    guard: AbstractContextManager[Any], attend: Attend, given: dict[str, Any]
) -> Attended | None:
    """``attend`` for a call of ``scaled_dot_product_attention``.

    Args:
        guard: What attending is inside of.
        attend: How.
        given: Arguments of the call by name; those that are left out may be missing.

    Returns:
        ``None`` where PyTorch's function has to make the call.
    """
    if any(given.get(name) for name in _PYTORCH_ALONE):
        return None
    query, key, value, mask = (given.get(n) for n in ("query", "key", "value", "attn_mask"))
    assert query is not None
    assert key is not None
    assert value is not None
    return attend_guarded(guard, attend, query, key, value, mask, scale=given.get("scale"))


def sdpa_call(
    guard: AbstractContextManager[Any],
    attend: Attend,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, dict[str, Any], Tensor | None]:
    """Make a call of ``scaled_dot_product_attention`` as a recorded layer makes it.

    Returns:
        Its output, its arguments by name, and its log-sum-exp or ``None``.
    """
    given = dict(zip(_SDPA_ARGUMENTS, args, strict=False)) | kwargs
    attended = attend_given(guard, attend, given)
    if attended is None:
        return F.scaled_dot_product_attention(*args, **kwargs), given, None
    return attended[0], given, attended[1]


def record_given(record: Record, given: dict[str, Any], **known: Any) -> None:
    """Record a call of ``scaled_dot_product_attention``.

    Args:
        record: What to hand query and key to.
        given: Arguments of the call by name.
        known: What else ``record`` is to be told.

    Raises:
        NotImplementedError: The call is a causal one.
    """
    if given.get("is_causal"):
        raise NotImplementedError("recording causal attention is not supported")
    query, key = given["query"], given["key"]
    known |= wanted(record, given["value"])
    if key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(groups, dim=1)
        if "value" in known:
            known["value"] = known["value"].repeat_interleave(groups, dim=1)
    record(query, key, bias=given.get("attn_mask"), scale=given.get("scale"), **known)
