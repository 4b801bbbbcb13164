"""The statistics as Triton kernels, for GPUs; on CPU tensors only under Triton's interpreter.

Where all keys of a head fit one tile (image tokens, text), two launches: row and partial column
log-sum-exps with parts of ``W P``, then all of them combined and ``C u``. Otherwise three passes at
most, each over the whole of QK^T: row log-sum-exps (unless the attention call gave them), then
column log-sum-exps together with ``W P``, then ``C u``.
"""

from functools import partial

import torch
from torch import Tensor

from i2am.kernels.arguments import runs_fused
from i2am.kernels.fused import forward, short, statistics
from i2am.kernels.fused.configs import MAX_HEAD_DIM, MAX_ROW_BLOCK, fits_short, width
from i2am.kernels.fused.primitives import INTERPRETED, read_together

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
    *,
    scale: float,
    bias: Tensor | None,
    query_weights: Tensor,
    key_weights: Tensor,
    r2g: Tensor | None,
    g2r: Tensor | None,
    query_lse: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Add ``C u`` to ``r2g`` and ``W P`` to ``g2r``; returns ``(query_lse, key_lse)``.

    Raises:
        RuntimeError: The tensors are not on a GPU and Triton's interpreter is off.
        ValueError: The dtype is fp64, or head_dim exceeds 256.
    """
    check(query)
    r2g = None if r2g is None or r2g.shape[2] == 0 else r2g
    g2r = None if g2r is None or g2r.shape[2] == 0 else g2r
    row_lse = None
    if query_lse is None:
        query_lse = row_lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    key_lse = key.new_empty(key.shape[:3], dtype=torch.float32)
    rows = max(1 if sums is None else sums.shape[2] for sums in (r2g, g2r))
    features = width(query.shape[3], read_together(query, key))
    if fits_short(features, query.element_size(), key.shape[2], rows):
        for launch in short.plan(
            query,
            key,
            scale=scale,
            bias=bias,
            query_weights=query_weights,
            key_weights=key_weights,
            r2g=r2g,
            g2r=g2r,
            query_lse=query_lse,
            row_lse=row_lse,
            key_lse=key_lse,
        ):
            launch.run(query.device)
        return query_lse, key_lse
    over_keys = partial(_pass, query, key, scale=scale, bias=bias)
    over_queries = partial(_pass, key, query, scale=scale, bias=None if bias is None else bias.mT)
    if g2r is None:
        # C u needs nothing of the rows: their log-sum-exp rides along
        over_queries(lse=key_lse)
        over_keys(lse=row_lse, other_lse=key_lse, weights=key_weights, sums=r2g)
    else:
        over_keys(lse=row_lse)
        over_queries(lse=key_lse, other_lse=query_lse, weights=query_weights, sums=g2r)
        over_keys(other_lse=key_lse, weights=key_weights, sums=r2g)
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
) -> None:
    """Run what is wanted of one pass: ``lse`` written, ``sums`` added into, ``None`` skipped."""
    if sums is None:
        if lse is not None:
            statistics.plan(owner, other, scale=scale, bias=bias, lse=lse).run(owner.device)
        return
    if lse is not None and sums.shape[2] > MAX_ROW_BLOCK:
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
    ).run(owner.device)
