"""The Triton kernels against the ruler: under the interpreter here, as they are where a GPU is.

Triton is imported inside the tests only, after conftest has chosen between the two.
"""

import math
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from i2am.kernels import Probe, attention_statistics, reference
from i2am.testing import (
    assert_matches_reference,
    attention_with_statistics,
    hardware_rounding,
    make_qkv,
)

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # numpy, under the interpreter: finfo.min * log2(e), and exponentials of tokens past the last
    pytest.mark.filterwarnings("ignore:overflow encountered"),
]

# the poison needs deterministic algorithms, and those need this before cuBLAS starts
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
interpreted = pytest.mark.skipif(DEVICE.type == "cuda", reason="looks into Triton's interpreter")
INF = float("inf")


def tokens(*shape, **options):
    """Query, key and value on the device under test; see `make_qkv`."""
    return make_qkv(*shape, device=DEVICE, **options)


def uniform(*shape, seed=0):
    """Random weights in [0, 1) that are the same on every device."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def eager_attention(query, key, value, *, scale=None, bias=None, **_):
    """The output as a model's eager attention computes it, with weights in the working dtype."""
    scores = query.float() @ key.float().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores.where(bias, -INF) if bias.dtype == torch.bool else scores + bias
    return scores.softmax(dim=-1).nan_to_num(0.0).to(value.dtype) @ value


def check(query, key, value, **arguments):
    """Fused attention with statistics, after holding it against the ruler."""
    inputs = (query, key, value)
    exact = attention_with_statistics(*(x.double() for x in inputs), impl="reference", **arguments)
    eager = attention_statistics(query, key, impl="reference", **arguments)
    actual = attention_with_statistics(*inputs, impl="fused", **arguments)
    # the same without the row log-sum-exp of the attention call
    alone = attention_statistics(query, key, impl="fused", **arguments)
    eager_output = eager_attention(*inputs, **arguments)
    rounding = hardware_rounding(query, key, scale=arguments.get("scale"))
    matches = partial(assert_matches_reference, rounding=rounding)
    matches(actual[0], exact=exact[0], eager=eager_output, name="output")
    for name in exact[1]._fields:
        ruler, budget = getattr(exact[1], name), getattr(eager, name)
        for which, statistics in (("with attention", actual[1]), ("alone", alone)):
            ours = getattr(statistics, name)
            assert ours.dtype == torch.float32
            matches(ours, exact=ruler, eager=budget, name=f"{name}, {which}")
    return actual


@pytest.fixture
def passes(monkeypatch):
    """What ran, in order: the kernel's name, or the sides and results of a pass of owners."""
    from i2am.kernels.fused.primitives import Launch

    seen = []
    original = Launch.run

    def spy(launch, device):
        arguments = launch.arguments
        if "owner_ptr" not in arguments:
            seen.append(launch.kernel.fn.__name__)
        else:
            results = [
                name for name in ("lse", "sums", "shares") if arguments[f"{name}_ptr"] is not None
            ]
            seen.append(f"{arguments['owners']} over {arguments['others']}: {' '.join(results)}")
        original(launch, device)

    monkeypatch.setattr(Launch, "run", spy)
    return seen


@pytest.fixture(params=["short", "long"])
def schedule(request, monkeypatch):
    """The schedule of few keys, then the one of many keys on the same few."""
    from i2am.kernels import fused

    if request.param == "long":
        monkeypatch.setattr(fused, "fits_short", lambda *_: False)


both_schedules = pytest.mark.usefixtures("schedule")


# --- the ruler ------------------------------------------------------------------------------------

SHAPES = [(1, 1), (1, 131), (131, 1), (63, 131)]
UNET_SHAPES = [(4096, 4096), (64, 77), (3072, 1037), (12288, 1), (768, 4145)]


def ids(shape):
    return f"{shape[0]}x{shape[1]}"


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_error_is_at_most_twice_the_eager_error(shape, dtype):
    check(*tokens(1, 1, *shape, 40, dtype=dtype))


def test_the_keys_of_the_custom_model():
    query, key, value = tokens(1, 1, 131, 1037, 40, dtype=torch.bfloat16)
    votes = torch.ones(1037, device=DEVICE)
    votes[0] = 0
    check(query, key, value, key_weights=votes / votes.sum())


@both_schedules
@dtypes
@pytest.mark.parametrize("head_dim", [40, 64, 72, 80, 96, 128, 160])
def test_the_head_dims_of_real_models(head_dim, dtype):
    check(*tokens(1, 1, 19, 37, head_dim, dtype=dtype))


@both_schedules
@pytest.mark.parametrize("head_dim", [1, 8, 17, 200, 256])
def test_any_head_dim(head_dim):
    check(*tokens(1, 1, 19, 37, head_dim, dtype=torch.float16))


@dtypes
@pytest.mark.parametrize("logits", [200, 5000])
@pytest.mark.parametrize("shape", [(19, 131), (131, 77)], ids=ids)
def test_large_logits(shape, logits, dtype):
    query, key, value = tokens(1, 1, *shape, 40, dtype=dtype, logits=logits)
    output, statistics = check(query, key, value)
    assert statistics.query_lse.abs().max() > 0.5 * logits
    assert not output.isnan().any()


# inf - inf in the tokens past the last, which are never stored
@both_schedules
@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
@pytest.mark.parametrize("offset", [1e4, -1e4], ids=["takes all", "takes nothing"])
def test_one_key_takes_all_mass_or_none(offset):
    query, key, value = tokens(1, 1, 63, 37, 40, dtype=torch.float16)
    bias = torch.zeros(37, device=DEVICE)
    bias[5] = offset
    _, statistics = check(query, key, value, bias=bias)
    share = statistics.g2r[0, 0, 0, 5].item()
    assert share == pytest.approx(1.0 if offset > 0 else 0.0, abs=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
@pytest.mark.parametrize("shape", [(63, 131), (70, 77)], ids=ids)
def test_keys_that_nobody_looks_at_keep_their_votes(shape):
    """exp(S) shared by both softmaxes would underflow there: those keys are summed afresh."""
    query, key, value = tokens(1, 1, *shape, 40)
    bias = torch.zeros(shape[1], device=DEVICE)
    bias[[3, 70]] = torch.tensor([-120.0, -400.0], device=DEVICE)
    unmasked = attention_statistics(query, key, impl="fused")
    actual = check(query, key, value, bias=bias)[1]
    # a constant cancels in the softmax over queries
    torch.testing.assert_close(actual.r2g, unmasked.r2g, rtol=1e-4, atol=0)
    torch.testing.assert_close(actual.key_lse, unmasked.key_lse + bias, rtol=1e-5, atol=1e-4)


@both_schedules
@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
def test_any_scale(scale):
    check(*tokens(1, 1, 19, 37, 40, dtype=torch.float16), scale=scale)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 40])
def test_several_rows_and_votes(count):
    # the last row block is not full, and neither are the last tokens
    query, key, value = tokens(2, 1, 37, 70, 40, dtype=torch.bfloat16)
    _, statistics = check(
        query,
        key,
        value,
        query_weights=uniform(2, count, 37),
        key_weights=uniform(1, count, 70, seed=1),
    )
    assert statistics.g2r.shape == (2, 1, count, 70)
    assert statistics.r2g.shape == (2, 1, count, 37)


@interpreted
def test_regions_are_computed_where_they_are(monkeypatch):
    """Blocks of weight rows look only at the tokens on which one of them is not 0."""
    from i2am.kernels.fused import statistics

    query, key, value = tokens(1, 1, 256, 40, 16)
    # a uniform row, then one row per token and rows that see nothing
    weights = torch.cat([torch.full((1, 256), 1 / 256), torch.eye(256), torch.zeros(7, 256)])
    check(query, key, value, query_weights=weights[None])
    tiles = []
    original = statistics.shares

    def spy(scores, lse):
        tiles.append(scores.shape)
        return original(scores, lse)

    monkeypatch.setattr(statistics, "shares", spy)
    attention_statistics(query, key, query_weights=weights[None], impl="fused")
    config = statistics.configs.statistics(16, 4, 40, 264, False)
    assert (config.BLOCK_OTHER, config.BLOCK_ROWS) == (32, 32)
    # the uniform row is in the first block of rows; every later one straddles two tiles of the
    # diagonal, the last one touches one; then come 4 blocks of queries over 2 of keys
    assert len(tiles) == 8 + 7 * 2 + 1 + 4 * 2


@both_schedules
@pytest.mark.parametrize(
    "layout",
    ["contiguous", "transposed", "sliced", "expanded_batch", "expanded_heads", "expanded_tokens"],
)
def test_any_strides(layout, relayout):
    query, key, value = (relayout(x, layout) for x in tokens(2, 2, 19, 35, 40, dtype=torch.float16))
    check(query, key, value, query_weights=uniform(2, 1, 38)[..., ::2])


@both_schedules
@pytest.mark.parametrize("head_dim", [72, 80, 96, 160])
@pytest.mark.parametrize("layout", ["sliced", "shifted"])
def test_features_that_are_not_read_8_at_a_time(layout, relayout, head_dim):
    """Where they lie in two blocks, ptxas 12.8 lost the second one's place in shared memory."""
    inputs = tokens(2, 2, 19, 35, head_dim, dtype=torch.float16)
    check(*(relayout(x, layout) for x in inputs))


@pytest.mark.parametrize("head_dim", [40, 80, 160])
@pytest.mark.parametrize("shape", [(1, 37), (200, 1), (1, 300), (1, 1)], ids=ids)
def test_counts_of_one(shape, head_dim):
    """Were 1 known to the compiler it would leave the loop away; see above."""
    bias = torch.zeros(shape[1], device=DEVICE)
    inputs = tokens(2, 2, *shape, head_dim, dtype=torch.float16)
    check(*inputs, bias=bias, query_weights=uniform(2, 5, shape[0]))


# --- masks ----------------------------------------------------------------------------------------


def _biases():
    M, N = 19, 40
    full = torch.randn(2, 2, M, N, generator=torch.Generator().manual_seed(3))
    keys = torch.arange(N) % 3 > 0
    holes = torch.ones(M, N, dtype=torch.bool)
    holes[3], holes[:, 5] = False, False
    return {
        "additive": full,
        "additive, half precision": full.half(),
        "additive, transposed": full.mT.contiguous().mT,
        "keys": keys,
        "keys, per item": torch.stack([keys, ~keys])[:, None, None],
        "a row and a column": holes,
        "nothing": torch.zeros(1, 1, 1, 1, dtype=torch.bool),
        "finite minimum": torch.zeros(N).masked_fill(keys, torch.finfo(torch.float32).min),
    }


@both_schedules
@pytest.mark.parametrize("name", _biases())
def test_biases(name):
    query, key, value = tokens(2, 2, 19, 40, 40, dtype=torch.bfloat16)
    bias = _biases()[name].to(DEVICE)
    output, statistics = check(query, key, value, bias=bias)
    for part in (output, *statistics):
        assert not part.isnan().any()
    if bias.dtype == torch.bool:
        full = bias.expand(2, 2, 19, 40)
        no_key, no_query = ~full.any(-1), ~full.any(-2)
        assert (output[no_key] == 0).all()
        assert (statistics.r2g[no_key] == 0).all()
        assert (statistics.query_lse[no_key] == -INF).all()
        assert (statistics.g2r[:, :, 0][no_query] == 0).all()
        assert (statistics.key_lse[no_query] == -INF).all()


@pytest.mark.parametrize("rows", [4, 5])
def test_a_bias_in_full_precision(rows):
    query, key, value = tokens(1, 1, 37, 70, 40)
    bias = torch.randn(37, 70, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    bias[3], bias[:, 5] = -INF, -INF
    check(query, key, value, bias=bias, query_weights=uniform(1, rows, 37))


# --- exact values ---------------------------------------------------------------------------------


@dtypes
def test_a_single_key_gives_its_value_back(dtype):
    query, key, value = tokens(2, 2, 19, 1, 72, dtype=dtype)
    output, statistics = attention_with_statistics(query, key, value, impl="fused")
    assert torch.equal(output, value.expand_as(output))
    torch.testing.assert_close(statistics.g2r, torch.ones(2, 2, 1, 1, device=DEVICE))


@dtypes
def test_outputs_are_rounded_to_nearest_even(dtype):
    query, key, value = tokens(1, 1, 1, 2, 160, dtype=dtype)
    output, _ = attention_with_statistics(query, key, value, scale=0.0, impl="fused")
    mean = value.double().mean(dim=2, keepdim=True)
    assert torch.equal(output, mean.to(dtype))


def test_both_maps_are_distributions():
    query, key, _ = tokens(2, 2, 37, 70, 40, dtype=torch.float16)
    statistics = attention_statistics(query, key, impl="fused")
    for sums in (statistics.r2g.sum(-1), statistics.g2r.sum(-1)):
        torch.testing.assert_close(sums, torch.ones_like(sums))


# --- accumulators, directions, passes -------------------------------------------------------------

M, N = 37, 131
ROWS_LSE, COLUMNS_LSE = f"{M} over {N}: lse", f"{N} over {M}: lse"
ROWS, COLUMNS = f"{M} over {N}: sums", f"{N} over {M}: lse sums"
BOTH, SHARES = f"{M} over {N}: sums shares", f"{M} over {N}: shares"


def accumulate(*, r2g=True, g2r=True, shares=0, normaliser=None, rows=1, impl=None, M=M, N=N):
    """Accumulators that already hold 0.5, inside larger poisoned ones; and the log-sum-exps."""
    from i2am.kernels import fused

    query, key, _ = tokens(2, 2, M, N, 40, dtype=torch.bfloat16)
    sums_r = torch.full((2, N, rows, 2, 2), torch.nan, device=DEVICE)[..., 1]
    sums_g = torch.full((4, 2, 1, 3 * M), torch.nan, device=DEVICE)[::2, ..., 1::3]
    g2r_sums = sums_r.permute(0, 3, 2, 1).fill_(0.5) if g2r else None
    r2g_sums = sums_g.fill_(0.5) if r2g else None
    groups = torch.full((2, 2, shares, M), 0.5, device=DEVICE)
    probes = [
        Probe("keys", g2r_sums, left=uniform(1, rows, M).expand(2, rows, M)) if g2r else None,
        Probe("queries", r2g_sums, right=uniform(1, 1, N, seed=1).expand(2, 1, N)) if r2g else None,
        Probe("keys", groups, right=uniform(1, shares, N, seed=2).expand(2, shares, N)),
    ]
    lses = (impl or fused).accumulate(
        query,
        key,
        [probe for probe in probes if probe is not None],
        scale=40**-0.5,
        bias=None,
        normaliser=normaliser,
    )
    return r2g_sums, g2r_sums, *lses, groups


@pytest.mark.parametrize("rows", [1, 40])
def test_sums_are_added_in_place(rows):
    actual, expected = accumulate(rows=rows), accumulate(rows=rows, impl=reference)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    # nothing beside them was touched
    storage = torch.empty(0, device=DEVICE).set_(actual[0].untyped_storage())
    assert storage.isnan().sum() == storage.numel() - actual[0].numel()


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, [ROWS_LSE, COLUMNS, ROWS]),
        ({"r2g": False}, [ROWS_LSE, COLUMNS]),
        ({"g2r": False}, [COLUMNS_LSE, f"{M} over {N}: lse sums"]),
        ({"r2g": False, "g2r": False}, [COLUMNS_LSE, ROWS_LSE]),
        ({"rows": 40}, [ROWS_LSE, COLUMNS_LSE, f"{N} over {M}: sums", ROWS]),
        ({"shares": 2}, [ROWS_LSE, COLUMNS, BOTH]),
        ({"shares": 40}, [ROWS_LSE, COLUMNS, BOTH, COLUMNS_LSE, SHARES]),
        ({"shares": 1, "r2g": False}, [ROWS_LSE, COLUMNS, SHARES]),
        ({"shares": 1, "g2r": False}, [COLUMNS_LSE, ROWS_LSE, BOTH]),
        ({"shares": 1, "r2g": False, "g2r": False}, [COLUMNS_LSE, ROWS_LSE, SHARES]),
    ],
    ids=str,
)
def test_only_what_is_wanted_runs(wanted, expected, passes):
    actual = accumulate(**wanted)
    assert passes == expected
    both = accumulate(**wanted | {"r2g": True, "g2r": True})
    for ours, theirs in zip(actual, both, strict=True):
        # other kernels, so maybe other roundings
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    expected_shares = accumulate(**wanted, impl=reference)[4]
    torch.testing.assert_close(actual[4], expected_shares, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, [COLUMNS, ROWS]),
        ({"g2r": False}, [COLUMNS_LSE, ROWS]),
        ({"shares": 1}, [COLUMNS, BOTH]),
    ],
    ids=["both", "reference to generated", "shares"],
)
def test_a_known_row_log_sum_exp_saves_a_pass(wanted, expected, passes):
    r2g, g2r, query_lse, key_lse, _ = accumulate()
    passes.clear()
    # smaller shares, in strided memory: what was given is what is used
    given = torch.stack([query_lse + 2.0, query_lse], dim=-1)[..., 0]
    again = accumulate(normaliser=given, **wanted)
    assert passes == expected
    assert again[2] is given
    torch.testing.assert_close(again[0], r2g, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(again[3], key_lse, rtol=1e-6, atol=1e-7)
    if again[1] is not None:
        expected_sums = (g2r - 0.5) * math.exp(-2.0) + 0.5
        torch.testing.assert_close(again[1], expected_sums)


def test_attention_hands_its_row_log_sum_exp_over(passes):
    query, key, value = tokens(2, 2, M, N, 40, dtype=torch.float16)
    attention_with_statistics(query, key, value, impl="fused")
    assert passes == ["attention_forward", COLUMNS, ROWS]


# --- few keys: two launches for everything --------------------------------------------------------

# 131 queries are three chunks, the last one not full
SHORT_M, SHORT_N = 131, 77
TWO = ["over_chunks", "over_queries"]
short_wanted = pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"r2g": False},
        {"g2r": False},
        {"r2g": False, "g2r": False},
        {"rows": 4},
        {"shares": 3},
        {"shares": 1, "r2g": False, "g2r": False},
    ],
    ids=str,
)


@pytest.mark.parametrize("count", [1, 4, 16, 64, 65, 77, 128, 129])
def test_few_keys(count, passes):
    dtype = DTYPES[count % 3]
    query, key, value = tokens(1, 1, 131, count, 40, dtype=dtype)
    votes = uniform(1, 3, count, seed=1)
    check(query, key, value, query_weights=uniform(1, 2, 131), key_weights=votes)
    few = [kernel for kernel in passes if kernel != "attention_forward"]
    assert few == 2 * TWO if count <= 128 else "over" in few[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_few_keys_and_masks(dtype):
    query, key, value = tokens(2, 1, 131, 77, 16, dtype=dtype)
    bias = torch.randn(2, 1, 131, 77, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    # a chunk in which nobody looks at key 7, and a whole chunk that looks at nothing
    bias[:, :, [3, 130]], bias[:, :, :, 5], bias[0, :, :64, 7] = -INF, -INF, -INF
    bias[1, :, 64:128] = -INF
    _, statistics = check(query, key, value, bias=bias)
    assert (statistics.query_lse[:, :, 3] == -INF).all()
    assert (statistics.key_lse[..., 5] == -INF).all()
    assert (statistics.r2g[:, :, 3] == 0).all()
    assert (statistics.g2r[..., 5] == 0).all()


def test_chunks_of_several_tiles():
    # more tiles of queries than there may be chunks
    check(*tokens(1, 1, 2100, 9, 16, dtype=torch.float16))


@pytest.mark.parametrize("given", [False, True], ids=["alone", "beside"])
@short_wanted
def test_few_keys_take_two_launches(wanted, given, passes):
    sizes = {"M": SHORT_M, "N": SHORT_N, "rows": wanted.get("rows", 1)}
    expected = accumulate(impl=reference, shares=wanted.get("shares", 0), **sizes)
    # in strided memory
    lse = torch.stack([expected[2], expected[2]], dim=-1)[..., 0] if given else None
    passes.clear()
    actual = accumulate(normaliser=lse, **sizes | wanted)
    assert passes == TWO
    assert (actual[2] is lse) == given
    for ours, theirs in zip(actual, expected, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for sums in (sums for sums in actual[:2] if sums is not None):
        # nothing beside them was touched
        storage = torch.empty(0, device=DEVICE).set_(sums.untyped_storage())
        assert storage.isnan().sum() == storage.numel() - sums.numel()


def test_few_keys_use_the_log_sum_exp_that_is_given():
    _, g2r, query_lse, _, _ = accumulate(M=SHORT_M, N=SHORT_N)
    again = accumulate(normaliser=query_lse + 2.0, M=SHORT_M, N=SHORT_N)
    torch.testing.assert_close(again[1], (g2r - 0.5) * math.exp(-2.0) + 0.5)


def test_a_single_key_takes_all_of_every_row(passes):
    _, g2r, query_lse, key_lse, _ = accumulate(M=SHORT_M, N=1)
    assert passes == TWO
    rows = uniform(1, 1, SHORT_M).sum()
    torch.testing.assert_close(g2r, (rows + 0.5).expand_as(g2r))
    torch.testing.assert_close(key_lse[..., 0], query_lse.logsumexp(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("head_dim", "itemsize", "keys", "rows", "fits"),
    [
        (40, 2, 128, 4, True),
        (40, 2, 129, 1, False),
        (40, 2, 77, 5, False),
        (192, 2, 128, 1, True),
        (256, 2, 64, 1, True),
        (200, 2, 65, 1, False),
        (256, 4, 128, 1, True),
    ],
)
def test_how_many_keys_are_few(head_dim, itemsize, keys, rows, fits):
    from i2am.kernels.fused import configs

    assert configs.fits_short(head_dim, itemsize, keys, rows) == fits


def test_few_keys_are_equal_to_the_bit():
    inputs = tokens(2, 2, SHORT_M, SHORT_N, 16, dtype=torch.float16)
    whole = results(*inputs)
    for once, again in zip(whole, results(*inputs), strict=True):
        assert torch.equal(once, again)
    for once, alone in zip(whole, results(*(x[1:2, 1:] for x in inputs)), strict=True):
        assert torch.equal(once[1:2, 1:], alone)


# --- bits -----------------------------------------------------------------------------------------


def results(query, key, value):
    output, statistics = attention_with_statistics(query, key, value, impl="fused")
    return output, *statistics


def test_two_runs_are_equal_to_the_bit():
    inputs = tokens(2, 2, 63, 131, 40, dtype=torch.float16)
    for once, again in zip(results(*inputs), results(*inputs), strict=True):
        assert torch.equal(once, again)


def test_items_and_heads_do_not_know_of_each_other():
    inputs = tokens(3, 2, 19, 131, 40, dtype=torch.float16)
    whole = results(*inputs)
    shuffled = results(*(x[[2, 0, 1]][:, [1, 0]] for x in inputs))
    alone = results(*(x[1:2, 1:] for x in inputs))
    for all_items, others, single in zip(whole, shuffled, alone, strict=True):
        assert torch.equal(all_items[[2, 0, 1]][:, [1, 0]], others)
        assert torch.equal(all_items[1:2, 1:], single)


# --- addresses ------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(("head_dim", "expected"), [(16, 1), (24, 8)])
@pytest.mark.parametrize("kernel", ["statistics", "attention", "chunks", "queries"])
def test_addresses_are_64_bit(kernel, head_dim, expected, monkeypatch):
    """Each stride in turn is as large as 32 bits allow; nothing is read, addresses are recorded."""
    from triton.runtime.interpreter import InterpreterBuilder

    from i2am.kernels.fused import forward, short, statistics

    # three of everything: twice the stride is what 32 bits cannot hold
    query, key, value = (x.contiguous() for x in make_qkv(3, 3, 3, 4, head_dim))
    lse, bias = torch.zeros(3, 3, 3), torch.zeros(3, 3, 3, 4)
    if kernel == "attention":
        named = {"query": query, "key": key, "value": value, "bias": bias}
        launch = forward.plan(**named, scale=1.0, output=torch.zeros_like(query), lse=lse)
    elif kernel in ("chunks", "queries"):
        inputs = {"query": query, "key": key, "bias": bias}
        first = {"given_lse": lse, "weights": torch.zeros(3, 3, 3)}
        second = {"votes": torch.zeros(3, 3, 4), "values": torch.zeros(3, 3, 4), "row_lse": lse}
        second |= {"r2g": torch.zeros(3, 3, 3, 3), "g2r": torch.zeros(3, 3, 3, 4)}
        second |= {"shares": torch.zeros(3, 3, 3, 3)}
        launches = short.plan(
            **inputs,
            scale=1.0,
            query_weights=first["weights"],
            key_weights=second["votes"],
            r2g=second["r2g"],
            g2r=second["g2r"],
            query_lse=lse,
            row_lse=None,
            key_lse=torch.zeros(3, 3, 4),
            values=second["values"],
            group_shares=second["shares"],
        )
        named = inputs | (first if kernel == "chunks" else second)
        launch = launches[kernel == "queries"]
    else:
        named = {"owner": query, "other": key, "bias": bias, "other_lse": torch.zeros(3, 3, 4)}
        named |= {"weights": torch.zeros(3, 3, 4), "sums": torch.zeros(3, 3, 3, 3)}
        named |= {"owner_lse": torch.zeros(3, 3, 3), "values": torch.zeros(3, 3, 4)}
        named |= {"shares": torch.zeros(3, 3, 3, 3)}
        launch = statistics.plan(**named, scale=1.0, lse=torch.zeros(3, 3, 3))

    features = ("query", "key", "value", "owner", "other")
    addresses = set()

    def record(ptrs, mask):
        addresses.update(int(address) for address in ptrs.data[mask.data.astype(bool)].flat)

    def load(builder, ptrs, mask, other, *_):
        record(ptrs, mask)
        return original(builder, ptrs, type(mask)(mask.data & False, mask.dtype), other, *_)

    def store(builder, ptrs, value, mask, *_):
        record(ptrs, mask)

    original = InterpreterBuilder.create_masked_load
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", store)
    assert launch.arguments["UNIT"] == expected
    checked = 0
    for name, tensor in named.items():
        own = [x for x in launch.arguments if x.rpartition("_")[0] == f"stride_{name}"]
        assert len(own) == tensor.ndim
        for axis, argument in enumerate(own):
            addresses.clear()
            unit = expected if name in features and axis < 3 else 1
            huge = 2**31 - unit
            steps = {argument: huge // unit}
            launch._replace(arguments=launch.arguments | steps).run(torch.device("cpu"))
            strides = [*tensor.stride()[:axis], huge, *tensor.stride()[axis + 1 :]]
            last = sum((size - 1) * step for size, step in zip(tensor.shape, strides, strict=True))
            assert tensor.data_ptr() + last * tensor.element_size() in addresses, argument
            checked += 1
    assert checked == sum(tensor.ndim for tensor in named.values())


# --- configurations -------------------------------------------------------------------------------


def test_every_tile_shape_serves_some_call(monkeypatch):
    from i2am.kernels.fused import configs

    class Looked(dict):
        def __getitem__(self, name):
            seen.add(name)
            return super().__getitem__(name)

    seen = set()
    monkeypatch.setattr(configs, "TILES", Looked(configs.TILES))
    for head_dim in range(1, configs.MAX_HEAD_DIM + 1):
        for itemsize in (2, 4):
            for bias in (False, True):
                for seqlen in (1, 768, 2048, 12288):
                    forward = configs.forward(head_dim, itemsize, seqlen, bias)
                    assert forward.BLOCK_V + forward.BLOCK_V_TAIL >= head_dim
                    for keys in (1, 16, 64, 77, 128):
                        for rows in (1, 2, 4):
                            if configs.fits_short(head_dim, itemsize, keys, rows):
                                short = configs.short(head_dim, itemsize, seqlen, keys, rows)
                                assert short.BLOCK_N >= keys
                                assert -(-seqlen // short.chunk) <= configs.MAX_CHUNKS
                    for rows in (1, 2, 4, 5, 16, 17, 768):
                        chosen = configs.statistics(head_dim, itemsize, seqlen, rows, bias)
                        assert chosen.BLOCK_ROWS >= min(rows, configs.MAX_ROW_BLOCK)
                        if itemsize == 2:
                            assert chosen.BLOCK_D + chosen.BLOCK_TAIL >= head_dim
    assert seen == set(configs.TILES)


@pytest.mark.parametrize(
    ("head_dim", "blocks"),
    [
        (1, (16, 0)),
        (16, (16, 0)),
        (40, (32, 16)),
        (64, (64, 0)),
        (72, (64, 16)),
        (80, (64, 16)),
        (96, (64, 32)),
        (128, (128, 0)),
        (160, (128, 32)),
        (256, (256, 0)),
    ],
)
def test_features_are_split_with_little_padding(head_dim, blocks):
    from i2am.kernels.fused import configs

    assert configs.features(head_dim) == blocks


def test_amd_gets_no_option_that_its_compiler_refuses(monkeypatch):
    from i2am.kernels.fused import configs

    chosen = configs.forward(40, 2, 64, False)
    assert chosen.maxnreg is not None
    monkeypatch.setattr(torch.version, "hip", None)
    assert configs.arguments(chosen) == chosen._asdict()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "maxnreg" not in configs.arguments(chosen)


@pytest.mark.parametrize("keys", [77, 140], ids=["few keys", "many keys"])
def test_a_smaller_batch_takes_the_kernels_of_a_larger_one(keys, monkeypatch):
    """Triton compiles anew for a number that is 1 or that 16 divides: none may come to be so."""
    from i2am.kernels.fused.primitives import Launch

    def kernels(query, key, **weights):
        seen.clear()
        attention_statistics(query, key, impl="fused", **weights)
        return list(seen)

    def record(launch, device):
        numbers = {name: x for name, x in launch.arguments.items() if isinstance(x, int)}
        kinds = {name: (x == 1, x % 16 == 0) for name, x in numbers.items()}
        seen.append((launch.kernel, kinds))

    seen = []
    monkeypatch.setattr(Launch, "run", record)
    query, key, _ = tokens(2, 2, 37, keys, 40, dtype=torch.float16)
    shared = {"query_weights": uniform(1, 3, 37), "key_weights": uniform(keys)}
    for weights in ({}, shared):
        both = kernels(query, key, **weights)
        assert len(both) == (2 if keys == 77 else 3)
        assert kernels(query[:1], key[:1], **weights) == both


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        (
            torch.zeros(1, 1, 2, 8, dtype=torch.float64),
            ValueError,
            "fp32, got torch.float64; impl=",
        ),
        (torch.zeros(1, 1, 2, 257), ValueError, "head_dim up to 256, got 257"),
    ],
    ids=["fp64", "head_dim"],
)
def test_refusals(query, error, message):
    from i2am.kernels import fused

    query = query.to(DEVICE)
    calls = [
        lambda: attention_statistics(query, query, impl="fused"),
        lambda: attention_with_statistics(query, query, query, impl="fused"),
        lambda: fused.attention(query, query, query, scale=1.0, bias=None),
    ]
    for call in calls:
        with pytest.raises(error, match=message):
            call()


def test_cpu_tensors_are_refused_without_the_interpreter(monkeypatch):
    from i2am.kernels import fused

    monkeypatch.setattr(fused, "INTERPRETED", False)
    query = torch.zeros(1, 1, 2, 8)
    assert not fused.is_available(query.device)
    with pytest.raises(RuntimeError, match="needs tensors on a GPU, or TRITON_INTERPRET=1"):
        attention_statistics(query, query, impl="fused")


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True)], ids=str)
def test_a_gpu_without_bf16_matrix_instructions_is_refused(monkeypatch, capability, runs):
    from i2am.kernels import fused

    card = SimpleNamespace(name="Tesla T4", major=capability[0], minor=capability[1])
    monkeypatch.setattr(fused, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    query = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16, shape=(1, 1, 2, 8))
    assert fused.is_available(query.device) == runs
    if runs:
        fused.check(query)
        return
    with pytest.raises(RuntimeError, match=r"8\.0 or newer .*, got Tesla T4 with 7\.5; impl='stre"):
        fused.check(query)


def test_triton_is_imported_only_with_the_fused_kernels():
    code = (
        "import sys, torch\n"
        "before = 'triton' in sys.modules\n"
        "import i2am.kernels\n"
        "assert ('triton' in sys.modules) == before\n"
        "import i2am.kernels.fused\n"
        "assert 'triton' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("head_dim", [40, 64, 72, 80, 96, 128, 160])
@pytest.mark.parametrize("shape", UNET_SHAPES, ids=ids)
def test_the_shapes_of_real_models(shape, head_dim, dtype):
    check(*tokens(1, 2, *shape, head_dim, dtype=dtype))


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("keys", [16, 77, 128, 1037])
@pytest.mark.parametrize("rows", [1, 4, 768])
def test_rows_at_full_size(rows, keys, dtype):
    query, key, value = tokens(2, 8, 3072, keys, 40, dtype=dtype, logits=200)
    bias = torch.zeros(keys, device=DEVICE)
    bias[::7] = -INF
    check(query, key, value, bias=bias, query_weights=uniform(2, rows, 3072))


@pytest.mark.gpu
def test_tensors_beyond_two_billion_elements():
    storage = torch.zeros(3, 2**30, dtype=torch.float16, device=DEVICE)
    query, key, value = tokens(3, 1, 64, 77, 40, dtype=torch.float16)
    step = 2**30 // 64
    far = storage.as_strided(query.shape, (2**30, 1, step, 1), 0).copy_(query)
    for ours, theirs in zip(results(far, key, value), results(query, key, value), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
def test_compiles_into_one_graph_where_the_card_decides():
    query, key, value = tokens(1, 2, 70, 77, 40, dtype=torch.float16)

    def call(query, key, value):
        return attention_with_statistics(query * 2, key, value)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    output, statistics = compiled(query, key, value)
    expected_output, expected = call(query, key, value)
    for ours, theirs in zip((output, *statistics), (expected_output, *expected), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
def test_recording_works_under_a_cuda_graph():
    first, second = (tokens(1, 8, 768, 1037, 80, dtype=torch.float16, seed=s) for s in (0, 1))
    live = [x.clone() for x in first]
    results(*live)  # compiled outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(*live)
    for x, new in zip(live, second, strict=True):
        x.copy_(new)
    graph.replay()
    for ours, theirs in zip(captured, results(*second), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("keys", [9, 140])
def test_no_weight_rows_and_no_votes_leave_the_log_sum_exps(keys):
    query, key, _ = tokens(1, 2, 70, keys, 16)
    nothing = {
        "query_weights": torch.zeros(1, 0, 70, device=DEVICE),
        "key_weights": torch.zeros(1, 0, keys, device=DEVICE),
    }
    actual = attention_statistics(query, key, impl="fused", **nothing)
    exact = attention_statistics(query, key, impl="reference")
    assert actual.r2g.shape == (1, 2, 0, 70)
    assert actual.g2r.shape == (1, 2, 0, keys)
    for name in ("query_lse", "key_lse"):
        torch.testing.assert_close(getattr(actual, name), getattr(exact, name))
