"""Log-sum-exps and weighted sums of both softmaxes, without the attention matrix.

One program owns BLOCK_OWNER tokens of one side (queries or keys) of one (batch, head) and walks all
tokens of the other side. It writes only what it owns: no atomics, the same bits in every run.
Memory beside the tiles is the log-sum-exp of each side.

    lse[owner]        = log sum_other exp(S[owner, other])
    sums[r, owner]   += sum_other weights[r, other] * exp(S[owner, other] - other_lse[other])
    shares[g, owner] += sum_other values[g, other]  * exp(S[owner, other] - owner_lse[owner])

With owner = key the sums are W P, with owner = query they are C V^T: the softmax in them runs over
the owner's own side, so its normaliser belongs to the other token. The shares are P V^T, owned by
queries, whose own normaliser it takes. Wanted together, all come from one exponential per score,
exp(S - other_lse) exp(other_lse) being exp(S); a block in which that could underflow walks once
more for its log-sum-exp, a tile in which it could takes an exponential more for its shares.
"""

# B batch, H heads, D head_dim, R weight rows; owners and others are M and N, or N and M
import triton
import triton.language as tl
from torch import Tensor

from i2am.kernels.fused import configs
from i2am.kernels.fused.primitives import (
    Launch,
    add_into,
    compensated_add,
    dot,
    exponential,
    feature_strides,
    keeping_loops,
    load_features,
    log_sum_exp,
    online_softmax,
    read_together,
    score_tile,
    shares,
    shares_of_rows,
    strides,
    weight_strides,
    weighted_sums,
    weighted_tile,
)

# e ** -60: what fp32 lost below it (from e ** -87 on) is less than e ** -27 of the sum
_SHARED_RANGE = tl.constexpr(8.75e-27)


@triton.jit
def walk_log_sum_exp(
    x,
    x_tail,
    owner_ptr,
    offs_owner,
    mask_owner,
    stride_owner_t,
    stride_owner_d,
    other_ptr,
    stride_other_t,
    stride_other_d,
    bias_ptr,
    stride_bias_owner,
    stride_bias_other,
    others,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    """Log-sum-exp of the owned tokens over all others, by an online softmax: right in any range."""
    running_max = tl.full([offs_owner.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([offs_owner.shape[0]], tl.float32)
    total_lost = tl.zeros([offs_owner.shape[0]], tl.float32)
    for start in range(0, others, BLOCK_OTHER):
        offs_other = start + tl.arange(0, BLOCK_OTHER)
        mask_other = offs_other < others
        # [BLOCK_OWNER, BLOCK_OTHER]
        scores = score_tile(
            x,
            x_tail,
            owner_ptr,
            offs_owner,
            mask_owner,
            stride_owner_t,
            stride_owner_d,
            other_ptr,
            offs_other,
            mask_other,
            stride_other_t,
            stride_other_d,
            bias_ptr,
            stride_bias_owner,
            stride_bias_other,
            scale,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_TAIL,
        )
        weights, correction, running_max = online_softmax(scores, running_max)
        total, total_lost = compensated_add(
            total * correction, total_lost * correction, tl.sum(weights, 1)
        )
    return log_sum_exp(running_max, total)


@triton.jit
def owner_pass(
    owner_ptr,
    other_ptr,
    bias_ptr,
    other_lse_ptr,
    weights_ptr,
    owner_lse_ptr,
    values_ptr,
    lse_ptr,
    sums_ptr,
    shares_ptr,
    stride_owner_b,
    stride_owner_h,
    stride_owner_t,
    stride_owner_d,
    stride_other_b,
    stride_other_h,
    stride_other_t,
    stride_other_d,
    stride_bias_b,
    stride_bias_h,
    stride_bias_owner,
    stride_bias_other,
    stride_other_lse_b,
    stride_other_lse_h,
    stride_other_lse_t,
    stride_weights_b,
    stride_weights_r,
    stride_weights_t,
    stride_sums_b,
    stride_sums_h,
    stride_sums_r,
    stride_sums_t,
    stride_owner_lse_b,
    stride_owner_lse_h,
    stride_owner_lse_t,
    stride_values_b,
    stride_values_r,
    stride_values_t,
    stride_shares_b,
    stride_shares_h,
    stride_shares_r,
    stride_shares_t,
    H,
    owners,
    others,
    rows,
    groups,
    scale,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_OWNER: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    ROW_PRECISION: tl.constexpr,
):
    """Writes ``lse``, adds into ``sums`` and ``shares``, each where its pointer is given."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(owners, BLOCK_OWNER)
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    offs_owner = (pid % blocks) * BLOCK_OWNER + tl.arange(0, BLOCK_OWNER)
    offs_rows = (pid // blocks % row_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask_owner = offs_owner < owners
    mask_rows = offs_rows < rows
    bh = (pid // blocks // row_blocks).to(tl.int64)
    b, h = bh // H, bh % H

    owner_ptr += (b * stride_owner_b + h * stride_owner_h) * UNIT
    other_ptr += (b * stride_other_b + h * stride_other_h) * UNIT
    stride_owner_t *= UNIT
    stride_other_t *= UNIT
    if bias_ptr is not None:
        bias_ptr += b * stride_bias_b + h * stride_bias_h
    # [BLOCK_OWNER, BLOCK_D], [BLOCK_OWNER, BLOCK_TAIL]
    x, x_tail = load_features(
        owner_ptr,
        offs_owner,
        mask_owner,
        stride_owner_t,
        stride_owner_d,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_TAIL,
    )
    if sums_ptr is not None or shares_ptr is not None:
        # thousands of tiles may come: fp32 sums over all of them keep what rounding takes
        if sums_ptr is not None:
            sums = tl.zeros([BLOCK_OWNER, BLOCK_ROWS], tl.float32)
            sums_lost = tl.zeros([BLOCK_OWNER, BLOCK_ROWS], tl.float32)
        if shares_ptr is not None:
            groups_sums = tl.zeros([BLOCK_OWNER, BLOCK_GROUPS], tl.float32)
            groups_lost = tl.zeros([BLOCK_OWNER, BLOCK_GROUPS], tl.float32)
            owner_lse = tl.load(
                owner_lse_ptr
                + b * stride_owner_lse_b
                + h * stride_owner_lse_h
                + offs_owner.to(tl.int64) * stride_owner_lse_t,
                mask=mask_owner,
                other=float("-inf"),
            )
        if lse_ptr is not None:
            pivot = tl.full([1], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_OWNER], tl.float32)
            total_lost = tl.zeros([BLOCK_OWNER], tl.float32)
        for start in range(0, others, BLOCK_OTHER):
            offs_other = start + tl.arange(0, BLOCK_OTHER)
            mask_other = offs_other < others
            offs_other64 = offs_other.to(tl.int64)
            if sums_ptr is not None:
                w_ptr = weights_ptr + b * stride_weights_b + offs_other64 * stride_weights_t
            if BLOCK_ROWS >= 16:
                # [BLOCK_OTHER, BLOCK_ROWS]
                w = tl.load(
                    w_ptr[:, None] + offs_rows[None, :].to(tl.int64) * stride_weights_r,
                    mask=mask_other[:, None] & mask_rows[None, :],
                    other=0.0,
                )
                # a region is 0 on most tokens, and so are its neighbours in the block
                needed = (tl.max((w != 0.0).to(tl.int32)) != 0) | (lse_ptr is not None)
            else:
                needed: tl.constexpr = True  # type: ignore[no-redef]
            if needed:
                # [BLOCK_OWNER, BLOCK_OTHER]
                scores = score_tile(
                    x,
                    x_tail,
                    owner_ptr,
                    offs_owner,
                    mask_owner,
                    stride_owner_t,
                    stride_owner_d,
                    other_ptr,
                    offs_other,
                    mask_other,
                    stride_other_t,
                    stride_other_d,
                    bias_ptr,
                    stride_bias_owner,
                    stride_bias_other,
                    scale,
                    HEAD_DIM,
                    BLOCK_D,
                    BLOCK_TAIL,
                )
                if sums_ptr is not None:
                    other_lse = tl.load(
                        other_lse_ptr
                        + b * stride_other_lse_b
                        + h * stride_other_lse_h
                        + offs_other64 * stride_other_lse_t,
                        mask=mask_other,
                        other=float("-inf"),
                    )
                    probability = shares(scores, other_lse[None, :])
                    if lse_ptr is not None:
                        # exp(S) once more, without an exponential per score
                        new_pivot = tl.maximum(pivot, tl.max(other_lse, 0))
                        # nothing but masked tokens so far: -inf - -inf would be NaN
                        finite = tl.where(new_pivot == float("-inf"), 0.0, new_pivot)
                        correction = exponential(pivot - finite)
                        back = exponential(other_lse - finite)
                        total, total_lost = compensated_add(
                            total * correction,
                            total_lost * correction,
                            tl.sum(probability * back[None, :], 1),
                        )
                        pivot = new_pivot
                    if BLOCK_ROWS >= 16:
                        tile = dot(probability, w, None, ROW_PRECISION)
                    else:
                        tile = weighted_sums(
                            probability, w_ptr, stride_weights_r, mask_other, rows, BLOCK_ROWS
                        )
                    sums, sums_lost = compensated_add(sums, sums_lost, tile)
                if shares_ptr is not None:
                    if sums_ptr is not None:
                        over_keys = shares_of_rows(scores, probability, other_lse, owner_lse)
                    else:
                        over_keys = shares(scores, owner_lse[:, None])
                    v_ptr = values_ptr + b * stride_values_b + offs_other64 * stride_values_t
                    tile = weighted_tile(
                        over_keys,
                        v_ptr,
                        stride_values_r,
                        mask_other,
                        groups,
                        BLOCK_GROUPS,
                        ROW_PRECISION,
                    )
                    groups_sums, groups_lost = compensated_add(groups_sums, groups_lost, tile)
    if lse_ptr is not None:
        if sums_ptr is not None:
            lse = log_sum_exp(tl.where(pivot == float("-inf"), 0.0, pivot), total)
            # below, what underflowed could matter
            to_walk = tl.min(tl.where(mask_owner, total, 1.0), 0) < _SHARED_RANGE
        else:
            to_walk: tl.constexpr = True  # type: ignore[no-redef]
        if to_walk:
            lse = walk_log_sum_exp(
                x,
                x_tail,
                owner_ptr,
                offs_owner,
                mask_owner,
                stride_owner_t,
                stride_owner_d,
                other_ptr,
                stride_other_t,
                stride_other_d,
                bias_ptr,
                stride_bias_owner,
                stride_bias_other,
                others,
                scale,
                HEAD_DIM,
                BLOCK_OTHER,
                BLOCK_D,
                BLOCK_TAIL,
            )
        tl.store(lse_ptr + bh * owners + offs_owner, lse, mask=mask_owner)
    if sums_ptr is not None:
        sums_ptr += b * stride_sums_b + h * stride_sums_h
        add_into(
            sums_ptr,
            offs_owner,
            mask_owner,
            stride_sums_t,
            offs_rows,
            mask_rows,
            stride_sums_r,
            sums,
        )
    if shares_ptr is not None:
        shares_ptr += b * stride_shares_b + h * stride_shares_h
        offs_groups = tl.arange(0, BLOCK_GROUPS)
        add_into(
            shares_ptr,
            offs_owner,
            mask_owner,
            stride_shares_t,
            offs_groups,
            offs_groups < groups,
            stride_shares_r,
            groups_sums,
        )


owner_pass_of_one = keeping_loops(owner_pass, "owners", "others")


def plan(
    owner: Tensor,
    other: Tensor,
    *,
    scale: float,
    bias: Tensor | None,
    lse: Tensor | None = None,
    other_lse: Tensor | None = None,
    weights: Tensor | None = None,
    sums: Tensor | None = None,
    owner_lse: Tensor | None = None,
    values: Tensor | None = None,
    shares: Tensor | None = None,
) -> Launch:
    """One pass of the owners over the others.

    Args:
        owner: ``[B, H, owners, D]``.
        other: ``[B, H, others, D]``.
        scale: Softmax scale.
        bias: ``[B, H, owners, others]`` or ``None``.
        lse: Contiguous fp32 ``[B, H, owners]``, written; ``None`` skips it.
        other_lse: fp32 ``[B, H, others]``, wanted with ``sums``.
        weights: fp32 ``[B, R, others]``, wanted with ``sums``.
        sums: fp32 ``[B, H, R, owners]``, added into; ``None`` skips it.
        owner_lse: fp32 ``[B, H, owners]``, wanted with ``shares``.
        values: fp32 ``[B, G, others]``, wanted with ``shares``; at most ``configs.MAX_ROW_BLOCK``
            groups, and with ``sums`` as few as fit a block of few rows.
        shares: fp32 ``[B, H, G, owners]``, added into; ``None`` skips it.
    """
    batch, heads, owners, head_dim = owner.shape
    rows = 1 if sums is None else sums.shape[2]
    groups = 0 if shares is None else shares.shape[2]
    width = configs.width(head_dim, read_together(owner, other))
    config = configs.statistics(width, owner.element_size(), owners, rows, bias is not None, groups)
    blocks = triton.cdiv(owners, config.BLOCK_OWNER) * triton.cdiv(rows, config.BLOCK_ROWS)
    arguments = {
        "owner_ptr": owner,
        "other_ptr": other,
        "bias_ptr": bias,
        "other_lse_ptr": other_lse,
        "weights_ptr": weights,
        "owner_lse_ptr": owner_lse,
        "values_ptr": values,
        "lse_ptr": lse,
        "sums_ptr": sums,
        "shares_ptr": shares,
        **feature_strides(owner=(owner, "t"), other=(other, "t")),
        **strides("bias", bias, ("b", "h", "owner", "other")),
        **strides("other_lse", other_lse, "bht"),
        **weight_strides("weights", weights, "brt"),
        **strides("sums", sums, "bhrt"),
        **strides("owner_lse", owner_lse, "bht"),
        **weight_strides("values", values, "brt"),
        **strides("shares", shares, "bhrt"),
        "H": heads,
        "owners": owners,
        "others": other.shape[2],
        "rows": rows,
        "groups": groups,
        "scale": scale,
        "HEAD_DIM": head_dim,
        "ROW_PRECISION": configs.ROW_PRECISION,
        **configs.arguments(config),
    }
    one = 1 in (owners, other.shape[2])
    return Launch(owner_pass_of_one if one else owner_pass, (batch * heads * blocks,), arguments)
