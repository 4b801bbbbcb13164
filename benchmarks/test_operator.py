"""One operator call: attention alone, recorded beside it, and the materialised way.

    pytest benchmarks/test_operator.py

Every group of rows is one shape; read the ratios inside a group, not the times.
"""

import pytest
import torch
import torch.nn.functional as F
from shapes import CUSTOM, WARP, AttentionShape

from i2am.kernels import accumulate_attention_statistics, attention_statistics
from i2am.kernels.streaming import attention_with_lse
from i2am.testing import assert_matches_reference, make_qkv

WAYS = ("attention", "recording", "materialised")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", CUSTOM + WARP, ids=str)
def test_call(benchmark, shape: AttentionShape, way: str) -> None:
    query, key, value = make_qkv(
        1, shape.heads, shape.seqlen_q, shape.seqlen_k, shape.head_dim, seed=0
    )
    r2g = torch.zeros(1, shape.heads, 1, shape.seqlen_q)
    g2r = torch.zeros(1, shape.heads, 1, shape.seqlen_k)
    # what the recorder has at hand: the attention call's own log-sum-exp
    with_lse = attention_with_lse(query, key, value)
    lse = None if with_lse is None else with_lse[1]

    def attention() -> None:
        F.scaled_dot_product_attention(query, key, value)

    def recording() -> None:
        accumulate_attention_statistics(query, key, r2g=r2g, g2r=g2r, query_lse=lse)

    def materialised() -> None:
        accumulate_attention_statistics(query, key, r2g=r2g, g2r=g2r, impl="reference")

    if way == "recording":
        # no speed is reported for a wrong result
        recording()
        _check(query, key, r2g, g2r)
    benchmark.group = str(shape)
    benchmark.extra_info["calls_per_evaluation"] = shape.calls
    work = {"attention": attention, "recording": recording, "materialised": materialised}[way]
    benchmark.pedantic(work, rounds=15, warmup_rounds=2)


def _check(query: torch.Tensor, key: torch.Tensor, r2g: torch.Tensor, g2r: torch.Tensor) -> None:
    few = slice(0, 1)  # one head: the fp64 matrix of all would take gigabytes
    exact = attention_statistics(query[:, few].double(), key[:, few].double(), impl="reference")
    eager = attention_statistics(query[:, few], key[:, few], impl="reference")
    for name, sums in (("r2g", r2g[:, few, 0]), ("g2r", g2r[:, few])):
        assert_matches_reference(
            sums, exact=getattr(exact, name), eager=getattr(eager, name), name=name
        )
