"""Names shared by every implementation: which one to run, and what it returns."""

from enum import StrEnum
from typing import NamedTuple

from torch import Tensor


class Impl(StrEnum):
    """Which implementation computes the statistics; the mathematics is the same."""

    FUSED = "fused"
    """Triton kernels, on a GPU (or on CPU tensors under Triton's interpreter)."""
    STREAMING = "streaming"
    """PyTorch, tile by tile: the CPU path; never holds the attention matrix."""
    REFERENCE = "reference"
    """Eager PyTorch that materialises the matrix and reads like the formulae; also fp64."""


class AttentionStatistics(NamedTuple):
    """Statistics of one attention call, fp32 (fp64 where the inputs are fp64).

    With ``S = scale * query @ key^T + bias``, ``P`` its softmax over the keys and ``C`` its softmax
    over the queries.
    """

    r2g: Tensor
    """``C u``: ``[batch, heads, seqlen_q]``, or ``[batch, heads, votes, seqlen_q]`` if
    ``key_weights`` had a votes axis."""
    g2r: Tensor
    """``W P``: ``[batch, heads, rows, seqlen_k]``."""
    query_lse: Tensor
    """Natural log-sum-exp over the keys, ``[batch, heads, seqlen_q]``."""
    key_lse: Tensor
    """Natural log-sum-exp over the queries, ``[batch, heads, seqlen_k]``."""
