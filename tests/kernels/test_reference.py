"""The specification against the formulae of README.md, written out once more in another way."""

import itertools
import math

import pytest
import torch

from i2am.kernels import (
    AttentionStatistics,
    attention_statistics,
    reference,
)
from i2am.testing import accumulate_maps, attention_with_statistics, make_qkv

# a GPU machine may have torch, triton, numpy and pytest alone; these tests are the CPU's
hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def spelled_out(query, key, *, scale, bias, rows, votes):
    """One query and one key at a time, in Python's own floats."""
    batch, heads, seqlen_q, _ = query.shape
    seqlen_k = key.shape[2]
    result = AttentionStatistics(
        torch.zeros(batch, heads, votes.shape[1], seqlen_q, dtype=torch.float64),
        torch.zeros(batch, heads, rows.shape[1], seqlen_k, dtype=torch.float64),
        torch.zeros(batch, heads, seqlen_q, dtype=torch.float64),
        torch.zeros(batch, heads, seqlen_k, dtype=torch.float64),
    )

    def log_sum_exp(values):
        top = max(values)
        if top == -math.inf:
            return top
        return top + math.log(math.fsum(math.exp(value - top) for value in values))

    for b, h in itertools.product(range(batch), range(heads)):
        q, k = query[b, h].tolist(), key[b, h].tolist()
        s = [
            [
                scale * math.fsum(x * y for x, y in zip(q[i], k[j], strict=True))
                + (0.0 if bias is None else bias[b, h, i, j].item())
                for j in range(seqlen_k)
            ]
            for i in range(seqlen_q)
        ]
        for i in range(seqlen_q):
            result.query_lse[b, h, i] = log_sum_exp(s[i])
        for j in range(seqlen_k):
            result.key_lse[b, h, j] = log_sum_exp([row[j] for row in s])
        for i, j in itertools.product(range(seqlen_q), range(seqlen_k)):
            if s[i][j] > -math.inf:
                p = math.exp(s[i][j] - result.query_lse[b, h, i].item())
                c = math.exp(s[i][j] - result.key_lse[b, h, j].item())
                result.g2r[b, h, :, j] += rows[b, :, i] * p
                result.r2g[b, h, :, i] += votes[b, :, j] * c
    return result


@st.composite
def small_calls(draw):
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    seqlen_q, seqlen_k = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    query, key, _ = make_qkv(
        batch,
        heads,
        seqlen_q,
        seqlen_k,
        draw(st.integers(1, 9)),
        dtype=torch.float64,
        seed=generator.initial_seed(),
        logits=draw(st.sampled_from([None, 10.0, 80.0, 200.0])),
    )
    bias = None
    if draw(st.booleans()):
        bias = torch.randn(batch, heads, seqlen_q, seqlen_k, generator=generator).double()
        hidden = torch.rand(bias.shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1]))
        bias = bias.masked_fill(hidden, -torch.inf)
    rows = torch.rand(batch, draw(st.integers(0, 3)), seqlen_q, generator=generator).double()
    votes = torch.rand(batch, draw(st.integers(0, 3)), seqlen_k, generator=generator).double()
    votes = votes * (torch.rand(votes.shape, generator=generator) > 0.3)
    scale = draw(st.sampled_from([0.2, 1.0, -0.5]))
    return query, key, {"scale": scale, "bias": bias}, rows, votes


@settings(derandomize=True, max_examples=60)
@given(call=small_calls())
def test_equals_the_formulae_spelled_out(call):
    query, key, options, rows, votes = call
    expected = spelled_out(query, key, **options, rows=rows, votes=votes)
    actual = attention_statistics(
        query, key, query_weights=rows, key_weights=votes, impl="reference", **options
    )
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def test_equals_both_softmaxes_of_pytorch():
    query, key, value = make_qkv(2, 3, 63, 131, 40, dtype=torch.float64)
    scores = torch.einsum("bhmd,bhnd->bhmn", query, key) / math.sqrt(40)
    over_keys, over_queries = scores.softmax(-1), scores.softmax(-2)
    output, statistics = attention_with_statistics(query, key, value, impl="reference")
    expected = AttentionStatistics(
        over_queries.mean(-1),
        over_keys.mean(-2, keepdim=True),
        scores.logsumexp(-1),
        scores.logsumexp(-2),
    )
    torch.testing.assert_close(statistics, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(output, over_keys @ value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_are_at_least_fp32_and_output_keeps_its_dtype(dtype):
    query, key, value = make_qkv(1, 2, 5, 7, 8, dtype=dtype)
    output, statistics = attention_with_statistics(query, key, value, impl="reference")
    assert output.dtype == dtype
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {part.dtype for part in statistics} == {expected}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_16_bit_inputs_are_computed_in_fp32(dtype):
    query, key, value = make_qkv(1, 2, 63, 131, 40, dtype=dtype, logits=80)
    actual = attention_statistics(query, key, impl="reference")
    expected = attention_statistics(query.float(), key.float(), impl="reference")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    output, _ = attention_with_statistics(query, key, value, impl="reference")
    exact, _ = attention_with_statistics(
        query.float(), key.float(), value.float(), impl="reference"
    )
    assert torch.equal(output, exact.to(dtype))


@pytest.mark.parametrize("logits", [10, 40, 80, 200])
def test_large_logits_lose_nothing_in_fp64(logits):
    query, key, _ = make_qkv(1, 2, 63, 40, 16, dtype=torch.float64, logits=logits)
    statistics = attention_statistics(query, key, impl="reference")
    for sums in (statistics.r2g, statistics.g2r):
        torch.testing.assert_close(sums.sum(-1), torch.ones_like(sums.sum(-1)))
    scores = query @ key.mT / 4
    assert scores.abs().max() > 0.99 * logits
    torch.testing.assert_close(statistics.query_lse, scores.logsumexp(-1), rtol=1e-12, atol=0)


def test_a_normaliser_is_taken_as_it_is():
    query, key, _ = make_qkv(1, 2, 5, 7, 8)
    expected = attention_statistics(query, key, impl="reference")
    r2g, g2r = torch.zeros(1, 2, 1, 5), torch.zeros(1, 2, 1, 7)
    given = torch.full((1, 2, 5), 9.0)
    query_lse, key_lse = accumulate_maps(
        query, key, r2g=r2g, g2r=g2r, normaliser=given, impl="reference"
    )
    assert query_lse is given
    assert torch.equal(key_lse, expected.key_lse)
    assert torch.equal(r2g[:, :, 0], expected.r2g)
    scores = query @ key.mT * 8**-0.5
    torch.testing.assert_close(g2r, (scores - 9.0).exp().mean(2, keepdim=True))


def test_a_fully_masked_row_attends_to_nothing():
    query, key, value = make_qkv(1, 1, 3, 4, 8)
    bias = torch.zeros(3, 4)
    bias[1] = -torch.inf
    output, lse = reference.attention(query, key, value, scale=1.0, bias=bias.expand(1, 1, 3, 4))
    assert lse[0, 0].isneginf().tolist() == [False, True, False]
    assert (output[0, 0, 1] == 0).all()
    assert output.isfinite().all()
