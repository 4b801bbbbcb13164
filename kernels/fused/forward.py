"""Attention output with its row log-sum-exp, in one pass over the keys.

One program owns BLOCK_M queries of one (batch, head) and walks all keys with an online softmax. It
writes only what it owns; memory beside the tiles is the output and the log-sum-exp.
"""

# B batch, H heads, M = seqlen_q, N = seqlen_k, D = head_dim
import triton
import triton.language as tl
from torch import Tensor

from i2am.kernels.fused import configs
from i2am.kernels.fused.primitives import (
    Launch,
    dot,
    feature_strides,
    keeping_loops,
    load_features,
    load_tile,
    log_sum_exp,
    online_softmax,
    read_together,
    round_to,
    score_tile,
    strides,
)


@triton.jit
def attention_forward(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    output_ptr,
    lse_ptr,
    stride_query_b,
    stride_query_h,
    stride_query_m,
    stride_query_d,
    stride_key_b,
    stride_key_h,
    stride_key_n,
    stride_key_d,
    stride_value_b,
    stride_value_h,
    stride_value_n,
    stride_value_d,
    stride_bias_b,
    stride_bias_h,
    stride_bias_m,
    stride_bias_n,
    H,
    M,
    N,
    scale,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_V_TAIL: tl.constexpr,
):
    """Writes contiguous ``output`` ``[B, H, M, D]`` and ``lse`` ``[B, H, M]``."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(M, BLOCK_M)
    offs_m = (pid % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    bh = (pid // blocks).to(tl.int64)
    b, h = bh // H, bh % H

    query_ptr += (b * stride_query_b + h * stride_query_h) * UNIT
    key_ptr += (b * stride_key_b + h * stride_key_h) * UNIT
    value_ptr += (b * stride_value_b + h * stride_value_h) * UNIT
    stride_query_m *= UNIT
    stride_key_n *= UNIT
    stride_value_n *= UNIT
    if bias_ptr is not None:
        bias_ptr += b * stride_bias_b + h * stride_bias_h
    # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_TAIL]
    q, q_tail = load_features(
        query_ptr, offs_m, mask_m, stride_query_m, stride_query_d, HEAD_DIM, BLOCK_D, BLOCK_TAIL
    )
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # [BLOCK_M, BLOCK_V], [BLOCK_M, BLOCK_V_TAIL]
    output = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if BLOCK_V_TAIL > 0:
        output_tail = tl.zeros([BLOCK_M, BLOCK_V_TAIL], tl.float32)

    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        # [BLOCK_M, BLOCK_N]
        scores = score_tile(
            q,
            q_tail,
            query_ptr,
            offs_m,
            mask_m,
            stride_query_m,
            stride_query_d,
            key_ptr,
            offs_n,
            mask_n,
            stride_key_n,
            stride_key_d,
            bias_ptr,
            stride_bias_m,
            stride_bias_n,
            scale,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_TAIL,
        )
        weights, correction, running_max = online_softmax(scores, running_max)
        total = total * correction + tl.sum(weights, 1)
        # [BLOCK_N, BLOCK_V]
        v = load_tile(
            value_ptr, offs_n, mask_n, stride_value_n, stride_value_d, 0, HEAD_DIM, BLOCK_V
        )
        weights = round_to(weights, v.dtype)
        output = dot(weights, v, output * correction[:, None], "ieee")
        if BLOCK_V_TAIL > 0:
            v = load_tile(
                value_ptr,
                offs_n,
                mask_n,
                stride_value_n,
                stride_value_d,
                BLOCK_V,
                HEAD_DIM,
                BLOCK_V_TAIL,
            )
            output_tail = dot(weights, v, output_tail * correction[:, None], "ieee")

    tl.store(lse_ptr + bh * M + offs_m, log_sum_exp(running_max, total), mask=mask_m)
    # a fully masked query attends to nothing: its output is 0 / 1
    total = tl.where(total == 0.0, 1.0, total)[:, None]
    output_ptr += bh * M * HEAD_DIM + offs_m[:, None].to(tl.int64) * HEAD_DIM
    offs_d = tl.arange(0, BLOCK_V)[None, :]
    output = round_to(output / total, output_ptr.dtype.element_ty)
    tl.store(output_ptr + offs_d, output, mask=mask_m[:, None] & (offs_d < HEAD_DIM))
    if BLOCK_V_TAIL > 0:
        offs_d = BLOCK_V + tl.arange(0, BLOCK_V_TAIL)[None, :]
        output_tail = round_to(output_tail / total, output_ptr.dtype.element_ty)
        tl.store(output_ptr + offs_d, output_tail, mask=mask_m[:, None] & (offs_d < HEAD_DIM))


attention_forward_of_one = keeping_loops(attention_forward, "M", "N")


def plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    bias: Tensor | None,
    output: Tensor,
    lse: Tensor,
) -> Launch:
    """The whole attention call.

    Args:
        query: ``[B, H, M, D]``.
        key: ``[B, H, N, D]``.
        value: ``[B, H, N, D]``.
        scale: Softmax scale.
        bias: ``[B, H, M, N]`` or ``None``.
        output: Contiguous ``[B, H, M, D]``, written.
        lse: Contiguous fp32 ``[B, H, M]``, written.
    """
    batch, heads, seqlen_q, head_dim = query.shape
    width = configs.width(head_dim, read_together(query, key, value))
    config = configs.forward(width, query.element_size(), seqlen_q, bias is not None)
    arguments = {
        "query_ptr": query,
        "key_ptr": key,
        "value_ptr": value,
        "bias_ptr": bias,
        "output_ptr": output,
        "lse_ptr": lse,
        **feature_strides(query=(query, "m"), key=(key, "n"), value=(value, "n")),
        **strides("bias", bias, "bhmn"),
        "H": heads,
        "M": seqlen_q,
        "N": key.shape[2],
        "scale": scale,
        "HEAD_DIM": head_dim,
        **configs.arguments(config),
    }
    grid = (batch * heads * triton.cdiv(seqlen_q, config.BLOCK_M),)
    one = 1 in (seqlen_q, key.shape[2])
    return Launch(attention_forward_of_one if one else attention_forward, grid, arguments)
