"""One operator call: attention alone, recorded beside it, and the materialised way.

    pytest benchmarks/test_operator.py

Every group of rows is one shape; read the ratios inside a group, not the times. ``streaming`` is
all that recording adds to an attention call; ``streaming, given lse`` is the same where that call
left its row log-sum-exp (the recorder's case on the CPU); ``attention, with lse`` is that call.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from shapes import CUSTOM, WARP, AttentionShape

from i2am.kernels import accumulate_attention_statistics, attention_statistics
from i2am.kernels.native import attention_with_lse
from i2am.testing import assert_matches_reference, make_qkv

WAYS = ("attention", "attention, with lse", "streaming", "streaming, given lse", "materialised")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", CUSTOM + WARP, ids=str)
def test_call(benchmark, shape: AttentionShape, way: str) -> None:
    query, key, value = make_qkv(
        1, shape.heads, shape.seqlen_q, shape.seqlen_k, shape.head_dim, seed=0
    )
    r2g = torch.zeros(1, shape.heads, 1, shape.seqlen_q)
    g2r = torch.zeros(1, shape.heads, 1, shape.seqlen_k)
    with_lse = attention_with_lse(query, key, value)
    lse = None if with_lse is None else with_lse[1]

    def record(**options: object) -> Callable[[], None]:
        return lambda: accumulate_attention_statistics(query, key, r2g=r2g, g2r=g2r, **options)

    work = {
        "attention": lambda: F.scaled_dot_product_attention(query, key, value),
        "attention, with lse": lambda: attention_with_lse(query, key, value),
        "streaming": record(impl="streaming"),
        "streaming, given lse": record(impl="streaming", query_lse=lse),
        "materialised": record(impl="reference"),
    }[way]
    if way.startswith("streaming"):
        # no speed is reported for a wrong result
        work()
        _check(query, key, r2g, g2r)
    benchmark.group = str(shape)
    benchmark.extra_info["calls_per_evaluation"] = shape.calls
    benchmark.pedantic(work, rounds=11, warmup_rounds=2)


def _check(query: torch.Tensor, key: torch.Tensor, r2g: torch.Tensor, g2r: torch.Tensor) -> None:
    few = slice(0, 1)  # one head: the fp64 matrix of all would take gigabytes
    exact = attention_statistics(query[:, few].double(), key[:, few].double(), impl="reference")
    eager = attention_statistics(query[:, few], key[:, few], impl="reference")
    for name, sums in (("r2g", r2g[:, few, 0]), ("g2r", g2r[:, few])):
        assert_matches_reference(
            sums, exact=getattr(exact, name), eager=getattr(eager, name), name=name
        )
