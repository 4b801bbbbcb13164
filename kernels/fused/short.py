"""Both softmaxes where all keys of a head fit one tile: two launches for everything.

With so few keys a pass owned by the keys would be one program per (batch, head). Here two kernels
are owned by the queries, and every program holds all keys:

    over_chunks   one program owns a chunk of the queries of one (batch, head), a few tiles of them:
                  their log-sum-exps are exact at once, columns and W P it sums over its chunk
    over_queries  one program owns one tile of queries: combines the chunks' column log-sum-exps and
                  adds C V^T and P V^T; the first of a (batch, head) also writes them and adds the
                  chunks' W P

No atomics: partial sums are combined in the order of the chunks, whose number depends on shapes
only. Memory beside the tiles is 1 + R numbers per key, chunk and (batch, head), at most 32 chunks.
"""

# B batch, H heads, M = seqlen_q, N = seqlen_k, D head_dim, C chunks, R weight rows, U votes
import triton
import triton.language as tl
from torch import Tensor

from i2am.kernels.fused import configs
from i2am.kernels.fused.primitives import (
    Launch,
    add_into,
    compensated_add,
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
)


@triton.jit
def over_chunks(
    query_ptr,
    key_ptr,
    bias_ptr,
    given_lse_ptr,
    weights_ptr,
    lse_ptr,
    columns_ptr,
    partial_ptr,
    stride_query_b,
    stride_query_h,
    stride_query_m,
    stride_query_d,
    stride_key_b,
    stride_key_h,
    stride_key_n,
    stride_key_d,
    stride_bias_b,
    stride_bias_h,
    stride_bias_m,
    stride_bias_n,
    stride_given_lse_b,
    stride_given_lse_h,
    stride_given_lse_m,
    stride_weights_b,
    stride_weights_r,
    stride_weights_m,
    H,
    M,
    N,
    rows,
    chunk,
    scale,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """Writes ``columns`` ``[B, H, C, N]``; ``lse`` and ``partial`` ``[B, H, C, R, N]`` if given."""
    pid = tl.program_id(0).to(tl.int64)
    C = tl.cdiv(M, chunk)
    bh, first = pid // C, (pid % C).to(tl.int32) * chunk
    b, h = bh // H, bh % H
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N

    query_ptr += (b * stride_query_b + h * stride_query_h) * UNIT
    key_ptr += (b * stride_key_b + h * stride_key_h) * UNIT
    if bias_ptr is not None:
        bias_ptr += b * stride_bias_b + h * stride_bias_h
    # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_TAIL]
    keys = (key_ptr, offs_n, mask_n, stride_key_n * UNIT, stride_key_d)
    k, k_tail = load_features(*keys, HEAD_DIM, BLOCK_D, BLOCK_TAIL)
    running_max = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    total_lost = tl.zeros([BLOCK_N], tl.float32)
    if partial_ptr is not None:
        # [BLOCK_N, BLOCK_ROWS]
        sums = tl.zeros([BLOCK_N, BLOCK_ROWS], tl.float32)
        sums_lost = tl.zeros([BLOCK_N, BLOCK_ROWS], tl.float32)

    for start in range(first, tl.minimum(first + chunk, M), BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        queries = (query_ptr, offs_m, mask_m, stride_query_m * UNIT, stride_query_d)
        # [BLOCK_N, BLOCK_M]
        if KEYS_FIRST:
            bias = (bias_ptr, stride_bias_n, stride_bias_m)
            scores = score_tile(
                k, k_tail, *keys, *queries, *bias, scale, HEAD_DIM, BLOCK_D, BLOCK_TAIL
            )
            scores = tl.where(mask_n[:, None], scores, float("-inf"))
        else:
            bias = (bias_ptr, stride_bias_m, stride_bias_n)
            q, q_tail = load_features(*queries, HEAD_DIM, BLOCK_D, BLOCK_TAIL)
            scores = score_tile(
                q, q_tail, *queries, *keys, *bias, scale, HEAD_DIM, BLOCK_D, BLOCK_TAIL
            )
            scores = tl.where(mask_m[None, :], tl.trans(scores), float("-inf"))
        if lse_ptr is not None:
            alone = tl.full([BLOCK_M], float("-inf"), tl.float32)
            probability, _, row_max = online_softmax(tl.trans(scores), alone)
            probability = tl.trans(probability)
            row_total = tl.sum(probability, 0)
            lse = log_sum_exp(row_max, row_total)
            tl.store(lse_ptr + bh * M + offs_m, lse, mask=mask_m)
        if partial_ptr is not None:
            offs_m64 = offs_m.to(tl.int64)
            if lse_ptr is not None:
                probability *= (1.0 / tl.where(row_total == 0.0, 1.0, row_total))[None, :]
            else:
                given_lse = tl.load(
                    given_lse_ptr
                    + b * stride_given_lse_b
                    + h * stride_given_lse_h
                    + offs_m64 * stride_given_lse_m,
                    mask=mask_m,
                    other=float("-inf"),
                )
                probability = shares(scores, given_lse[None, :])
            w_ptr = weights_ptr + b * stride_weights_b + offs_m64 * stride_weights_m
            # [BLOCK_N, BLOCK_ROWS]
            tile = weighted_sums(probability, w_ptr, stride_weights_r, mask_m, rows, BLOCK_ROWS)
            sums, sums_lost = compensated_add(sums, sums_lost, tile)
        # an exponential of its own: right in any range
        weights, correction, running_max = online_softmax(scores, running_max)
        total, total_lost = compensated_add(
            total * correction, total_lost * correction, tl.sum(weights, 1)
        )
    tl.store(columns_ptr + pid * N + offs_n, log_sum_exp(running_max, total), mask=mask_n)
    if partial_ptr is not None:
        offs_rows = tl.arange(0, BLOCK_ROWS)
        parts = partial_ptr + (pid * rows + offs_rows[None, :]) * N + offs_n[:, None]
        tl.store(parts, sums, mask=mask_n[:, None] & (offs_rows < rows)[None, :])


@triton.jit
def over_queries(
    query_ptr,
    key_ptr,
    bias_ptr,
    columns_ptr,
    partial_ptr,
    votes_ptr,
    row_lse_ptr,
    values_ptr,
    lse_ptr,
    r2g_ptr,
    g2r_ptr,
    shares_ptr,
    stride_query_b,
    stride_query_h,
    stride_query_m,
    stride_query_d,
    stride_key_b,
    stride_key_h,
    stride_key_n,
    stride_key_d,
    stride_bias_b,
    stride_bias_h,
    stride_bias_m,
    stride_bias_n,
    stride_votes_b,
    stride_votes_u,
    stride_votes_n,
    stride_r2g_b,
    stride_r2g_h,
    stride_r2g_u,
    stride_r2g_m,
    stride_g2r_b,
    stride_g2r_h,
    stride_g2r_r,
    stride_g2r_n,
    stride_row_lse_b,
    stride_row_lse_h,
    stride_row_lse_m,
    stride_values_b,
    stride_values_g,
    stride_values_n,
    stride_shares_b,
    stride_shares_h,
    stride_shares_g,
    stride_shares_m,
    H,
    M,
    N,
    rows,
    votes,
    groups,
    chunk,
    scale,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VOTES: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    """Writes ``lse`` ``[B, H, N]``; adds into ``r2g``, ``g2r`` and ``shares``, where given."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(M, BLOCK_M) if r2g_ptr is not None or shares_ptr is not None else 1
    bh, block = (pid // blocks).to(tl.int64), pid % blocks
    b, h = bh // H, bh % H
    C = tl.cdiv(M, chunk)
    offs_n, offs_c = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    mask_n, mask_c = offs_n < N, offs_c < C
    # [BLOCK_N, BLOCK_C]
    mask = mask_n[:, None] & mask_c[None, :]
    columns = columns_ptr + (bh * C + offs_c[None, :]) * N + offs_n[:, None]
    columns = tl.load(columns, mask=mask, other=float("-inf"))
    alone = tl.full([BLOCK_N], float("-inf"), tl.float32)
    weights, _, column_max = online_softmax(columns, alone)
    lse = log_sum_exp(column_max, tl.sum(weights, 1))
    if block == 0:
        tl.store(lse_ptr + bh * N + offs_n, lse, mask=mask_n)
        if g2r_ptr is not None:
            g2r_ptr += b * stride_g2r_b + h * stride_g2r_h
            parts = partial_ptr + (bh * C + offs_c[None, :]) * rows * N + offs_n[:, None]
            offs_rows = tl.arange(0, BLOCK_ROWS)
            # [BLOCK_N, BLOCK_ROWS]
            sums = tl.zeros([BLOCK_N, BLOCK_ROWS], tl.float32)
            for r in tl.static_range(BLOCK_ROWS):
                part = tl.load(parts + r * N, mask=mask & (r < rows), other=0.0)
                sums += tl.where(offs_rows[None, :] == r, tl.sum(part, 1)[:, None], 0.0)
            mask_rows = offs_rows < rows
            add_into(
                g2r_ptr, offs_n, mask_n, stride_g2r_n, offs_rows, mask_rows, stride_g2r_r, sums
            )
    if r2g_ptr is not None or shares_ptr is not None:
        query_ptr += (b * stride_query_b + h * stride_query_h) * UNIT
        key_ptr += (b * stride_key_b + h * stride_key_h) * UNIT
        if bias_ptr is not None:
            bias_ptr += b * stride_bias_b + h * stride_bias_h
        offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        keys = (key_ptr, offs_n, mask_n, stride_key_n * UNIT, stride_key_d)
        queries = (query_ptr, offs_m, mask_m, stride_query_m * UNIT, stride_query_d)
        bias = (bias_ptr, stride_bias_m, stride_bias_n)
        # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_TAIL]
        q, q_tail = load_features(*queries, HEAD_DIM, BLOCK_D, BLOCK_TAIL)
        # [BLOCK_M, BLOCK_N]
        scores = score_tile(q, q_tail, *queries, *keys, *bias, scale, HEAD_DIM, BLOCK_D, BLOCK_TAIL)
        offs_n64 = offs_n.to(tl.int64)
        probability = shares(scores, lse[None, :])
        if shares_ptr is not None:
            row_lse = tl.load(
                row_lse_ptr
                + b * stride_row_lse_b
                + h * stride_row_lse_h
                + offs_m.to(tl.int64) * stride_row_lse_m,
                mask=mask_m,
                other=float("-inf"),
            )
            over_keys = shares_of_rows(scores, probability, lse, row_lse)
            v_ptr = values_ptr + b * stride_values_b + offs_n64 * stride_values_n
            # [BLOCK_M, BLOCK_GROUPS]
            sums = weighted_sums(over_keys, v_ptr, stride_values_g, mask_n, groups, BLOCK_GROUPS)
            shares_ptr += b * stride_shares_b + h * stride_shares_h
            offs_g = tl.arange(0, BLOCK_GROUPS)
            mask_g = offs_g < groups
            add_into(
                shares_ptr, offs_m, mask_m, stride_shares_m, offs_g, mask_g, stride_shares_g, sums
            )
        if r2g_ptr is not None:
            u_ptr = votes_ptr + b * stride_votes_b + offs_n64 * stride_votes_n
            # [BLOCK_M, BLOCK_VOTES]
            sums = weighted_sums(probability, u_ptr, stride_votes_u, mask_n, votes, BLOCK_VOTES)
            r2g_ptr += b * stride_r2g_b + h * stride_r2g_h
            offs_u = tl.arange(0, BLOCK_VOTES)
            mask_u = offs_u < votes
            add_into(r2g_ptr, offs_m, mask_m, stride_r2g_m, offs_u, mask_u, stride_r2g_u, sums)


over_chunks_of_one = keeping_loops(over_chunks, "M", "N")
over_queries_of_one = keeping_loops(over_queries, "M", "N")


def plan(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    bias: Tensor | None,
    query_weights: Tensor | None,
    key_weights: Tensor | None,
    r2g: Tensor | None,
    g2r: Tensor | None,
    query_lse: Tensor | None,
    row_lse: Tensor | None,
    key_lse: Tensor,
    values: Tensor | None = None,
    group_shares: Tensor | None = None,
) -> tuple[Launch, Launch]:
    """Both launches, in order; allocates what the first leaves for the second.

    Args:
        query: ``[B, H, M, D]``.
        key: ``[B, H, N, D]``, few enough for ``configs.fits_short``.
        scale: Softmax scale.
        bias: ``[B, H, M, N]`` or ``None``.
        query_weights: fp32 ``[B, R, M]``, wanted with ``g2r``.
        key_weights: fp32 ``[B, U, N]``, wanted with ``r2g``.
        r2g: fp32 ``[B, H, U, M]``, added into; ``None`` skips it.
        g2r: fp32 ``[B, H, R, N]``, added into; ``None`` skips it.
        query_lse: fp32 ``[B, H, M]`` where it is known.
        row_lse: Contiguous fp32 ``[B, H, M]``, written; ``None`` if ``query_lse`` is known.
        key_lse: Contiguous fp32 ``[B, H, N]``, written.
        values: fp32 ``[B, G, N]``, wanted with ``group_shares``.
        group_shares: fp32 ``[B, H, G, M]``, added into; ``None`` skips it.
    """
    batch, heads, seqlen_q, head_dim = query.shape
    seqlen_k = key.shape[2]
    rows = 1 if g2r is None else g2r.shape[2]
    votes = 1 if r2g is None else r2g.shape[2]
    groups = 1 if group_shares is None else group_shares.shape[2]
    known_lse = query_lse if row_lse is None else row_lse
    width = configs.width(head_dim, read_together(query, key))
    config = configs.short(
        width, query.element_size(), seqlen_q, seqlen_k, max(rows, votes, groups)
    )
    chunks = triton.cdiv(seqlen_q, config.chunk)
    columns = key_lse.new_empty((batch, heads, chunks, seqlen_k))
    partial = None if g2r is None else key_lse.new_empty((batch, heads, chunks, rows, seqlen_k))
    shared = {
        "query_ptr": query,
        "key_ptr": key,
        "bias_ptr": bias,
        "columns_ptr": columns,
        "partial_ptr": partial,
        **feature_strides(query=(query, "m"), key=(key, "n")),
        **strides("bias", bias, "bhmn"),
        "H": heads,
        "M": seqlen_q,
        "N": seqlen_k,
        "rows": rows,
        "scale": scale,
        "HEAD_DIM": head_dim,
        "BLOCK_ROWS": triton.next_power_of_2(rows),
        **configs.arguments(config),
    }
    first = {
        # matrix instructions want 64 of what comes first; the sums over the tiles lie in fewer
        # registers when those are the keys
        "KEYS_FIRST": query.element_size() == 4 or config.BLOCK_N >= 64,
        "given_lse_ptr": query_lse,
        "weights_ptr": query_weights,
        "lse_ptr": row_lse,
        **strides("given_lse", query_lse, "bhm"),
        **weight_strides("weights", query_weights, "brm"),
    }
    second = {
        "votes_ptr": key_weights,
        "row_lse_ptr": None if group_shares is None else known_lse,
        "values_ptr": values,
        "lse_ptr": key_lse,
        "r2g_ptr": r2g,
        "g2r_ptr": g2r,
        "shares_ptr": group_shares,
        **weight_strides("votes", key_weights, "bun"),
        **strides("r2g", r2g, "bhum"),
        **strides("g2r", g2r, "bhrn"),
        **strides("row_lse", None if group_shares is None else known_lse, "bhm"),
        **weight_strides("values", values, "bgn"),
        **strides("shares", group_shares, "bhgm"),
        "votes": votes,
        "groups": groups,
        "BLOCK_C": configs.MAX_CHUNKS,
        "BLOCK_VOTES": triton.next_power_of_2(votes),
        "BLOCK_GROUPS": triton.next_power_of_2(groups),
    }
    blocks = 1 if r2g is None and group_shares is None else triton.cdiv(seqlen_q, config.BLOCK_M)
    kernels = (over_chunks, over_queries)
    if 1 in (seqlen_q, seqlen_k):
        kernels = (over_chunks_of_one, over_queries_of_one)
    return (
        Launch(kernels[0], (batch * heads * chunks,), shared | first),
        Launch(kernels[1], (batch * heads * blocks,), shared | second),
    )
