"""What the public functions promise whatever the implementation, and what they refuse."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from i2am import kernels
from i2am.kernels import (
    AttentionStatistics,
    Impl,
    Pooling,
    Probe,
    attention_statistics,
    reference,
    streaming,
)
from i2am.kernels.arguments import implementation
from i2am.kernels.probes import packed
from i2am.testing import accumulate_maps, attention_with_statistics, make_qkv

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
B, H, M, N, D = 2, 3, 23, 17, 8
POOLING = Pooling.of([(5 * i, torch.ones(1, 5) / 5) for i in range(3)], M)


@pytest.fixture(params=["reference", "streaming"])
def impl(request):
    return request.param


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def with_statistics(query, key, **arguments):
    """`attention_with_statistics` with some value, its statistics only."""
    return attention_with_statistics(query, key, key.flip(2), **arguments)[1]


def accumulated(query, key, **arguments):
    """The in-place form on accumulators of 0: `(r2g with its votes axis, g2r)`."""
    batch, heads, seqlen_q, _ = query.shape
    seqlen_k = key.shape[2]
    given = {name: arguments.get(name) for name in ("query_weights", "key_weights")}
    rows = 1 if given["query_weights"] is None else given["query_weights"].shape[1]
    votes = given["key_weights"]
    votes = 1 if votes is None or votes.ndim < 3 else votes.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    r2g = torch.zeros(batch, heads, votes, seqlen_q, dtype=dtype)
    g2r = torch.zeros(batch, heads, rows, seqlen_k, dtype=dtype)
    accumulate_maps(query, key, r2g=r2g, g2r=g2r, **arguments)
    return r2g, g2r


FUNCTIONS = [attention_statistics, with_statistics, accumulated]
functions = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)


def close(actual, expected, dtype=torch.float32):
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- properties that need no oracle ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logits", [None, 40, 200])
def test_every_query_and_every_key_spends_exactly_its_weight(impl, dtype, logits):
    query, key, _ = make_qkv(B, H, M, N, D, dtype=dtype, logits=logits)
    rows, votes = rand(B, 3, M), rand(B, 2, N, seed=1)
    statistics = attention_statistics(query, key, query_weights=rows, key_weights=votes, impl=impl)
    exact = statistics.g2r.dtype
    torch.testing.assert_close(
        statistics.g2r.sum(-1), rows.sum(-1)[:, None].expand(B, H, 3).to(exact), rtol=2e-5, atol=0
    )
    torch.testing.assert_close(
        statistics.r2g.sum(-1), votes.sum(-1)[:, None].expand(B, H, 2).to(exact), rtol=2e-5, atol=0
    )


def test_default_weights_are_uniform_and_both_maps_sum_to_1(impl):
    query, key, _ = make_qkv(B, H, M, N, D, dtype=torch.float64)
    default = attention_statistics(query, key, impl=impl)
    uniform = attention_statistics(
        query,
        key,
        query_weights=torch.ones(1, 1, M, dtype=torch.float64) / M,
        key_weights=torch.ones(N, dtype=torch.float64) / N,
        impl=impl,
    )
    close(default, uniform, torch.float64)
    close(default.r2g.sum(-1), torch.ones(B, H, dtype=torch.float64), torch.float64)
    close(default.g2r.sum(-1), torch.ones(B, H, 1, dtype=torch.float64), torch.float64)


def test_linear_in_both_weights(impl):
    query, key, _ = make_qkv(B, H, M, N, D, dtype=torch.float64)
    rows, more_rows = randn(B, 2, M), randn(B, 2, M, seed=1)
    votes, more_votes = randn(B, 2, N), randn(B, 2, N, seed=1)

    def statistics(query_weights, key_weights):
        return attention_statistics(
            query, key, query_weights=query_weights, key_weights=key_weights, impl=impl
        )

    one, other = statistics(rows, votes), statistics(more_rows, more_votes)
    mixed = statistics(2 * rows - more_rows, 2 * votes - more_votes)
    tolerance = {"rtol": 1e-6, "atol": 1e-6}  # the weights were mixed in fp32
    torch.testing.assert_close(mixed.r2g, 2 * one.r2g - other.r2g, **tolerance)
    torch.testing.assert_close(mixed.g2r, 2 * one.g2r - other.g2r, **tolerance)


def test_one_row_per_query_gives_the_attention_matrix_itself(impl):
    query, key, _ = make_qkv(B, H, M, N, D)
    scores = query @ key.mT / D**0.5
    statistics = attention_statistics(
        query, key, query_weights=torch.eye(M)[None], key_weights=torch.eye(N)[None], impl=impl
    )
    close(statistics.g2r, scores.softmax(-1))
    close(statistics.r2g, scores.softmax(-2).mT)


@pytest.mark.parametrize("shape", [(N,), (1, N), (B, N)], ids=["[N]", "[1, N]", "[B, N]"])
def test_one_vote_vector_has_no_votes_axis(impl, shape):
    query, key, _ = make_qkv(B, H, M, N, D)
    votes = rand(*shape)
    actual = attention_statistics(query, key, key_weights=votes, impl=impl)
    full = votes.expand(B, N)[:, None]
    expected = attention_statistics(query, key, key_weights=full, impl=impl)
    assert actual.r2g.shape == (B, H, M)
    assert expected.r2g.shape == (B, H, 1, M)
    close(actual.r2g, expected.r2g[:, :, 0])


def test_several_rows_and_votes_equal_one_at_a_time(impl):
    query, key, _ = make_qkv(B, H, M, N, D)
    rows, votes = randn(1, 4, M), randn(B, 3, N)
    together = attention_statistics(query, key, query_weights=rows, key_weights=votes, impl=impl)
    assert together.g2r.shape == (B, H, 4, N)
    assert together.r2g.shape == (B, H, 3, M)
    for row in range(4):
        alone = attention_statistics(query, key, query_weights=rows[:, row : row + 1], impl=impl)
        close(together.g2r[:, :, row], alone.g2r[:, :, 0])
    for vote in range(3):
        alone = attention_statistics(query, key, key_weights=votes[:, vote], impl=impl)
        close(together.r2g[:, :, vote], alone.r2g)


def test_a_vote_of_0_drops_a_token_from_the_vote_but_not_from_the_softmax(impl):
    query, key, _ = make_qkv(B, H, M, N, D)
    votes = rand(N)
    votes[:2] = 0
    everything = attention_statistics(query, key, impl=impl)
    dropped = attention_statistics(query, key, key_weights=votes, impl=impl)
    # R2G as if these keys did not exist, G2R as if nothing had happened
    without = attention_statistics(query, key[:, :, 2:], key_weights=votes[2:], impl=impl)
    close(dropped.r2g, without.r2g)
    for name in ("g2r", "query_lse", "key_lse"):
        assert torch.equal(getattr(dropped, name), getattr(everything, name))
    assert not torch.allclose(dropped.g2r[..., 2:], without.g2r)


def test_permuted_batch_heads_queries_and_keys_permute_the_result(impl):
    query, key, _ = make_qkv(B, H, M, N, D)
    rows, votes = rand(B, 2, M), rand(B, 2, N)
    expected = attention_statistics(query, key, query_weights=rows, key_weights=votes, impl=impl)
    b, h, m, n = (torch.randperm(size, generator=torch.Generator()) for size in (B, H, M, N))
    actual = attention_statistics(
        query[b][:, h][:, :, m],
        key[b][:, h][:, :, n],
        query_weights=rows[b][..., m],
        key_weights=votes[b][..., n],
        impl=impl,
    )
    close(actual.r2g, expected.r2g[b][:, h][..., m])
    close(actual.g2r, expected.g2r[b][:, h][..., n])
    close(actual.query_lse, expected.query_lse[b][:, h][..., m])
    close(actual.key_lse, expected.key_lse[b][:, h][..., n])


@pytest.mark.parametrize("axis", [0, 1], ids=["batch", "heads"])
def test_appended_batch_or_heads_change_nothing(axis, impl):
    query, key, _ = make_qkv(B, H, M, N, D)
    more_query, more_key, _ = make_qkv(B, H, M, N, D, seed=1, logits=200)
    alone = attention_statistics(query, key, impl=impl)
    appended = attention_statistics(
        torch.cat([query, more_query], axis), torch.cat([key, more_key], axis), impl=impl
    )
    for part, longer in zip(alone, appended, strict=True):
        close(longer.narrow(axis, 0, part.shape[axis]), part)


def test_scale_defaults_to_the_root_of_head_dim_and_0_is_a_scale(impl):
    query, key, _ = make_qkv(B, H, M, N, D)
    default = attention_statistics(query, key, impl=impl)
    close(attention_statistics(query, key, scale=D**-0.5, impl=impl), default)
    flat = attention_statistics(query, key, scale=0, impl=impl)
    close(flat.g2r, torch.full_like(flat.g2r, 1 / N))
    close(flat.r2g, torch.full_like(flat.r2g, 1 / M))


def test_direct_and_in_place_forms_agree_to_the_bit(impl):
    query, key, _ = make_qkv(B, H, M, N, D)
    arguments = {
        "bias": randn(M, N),
        "query_weights": rand(B, 2, M),
        "key_weights": rand(B, 2, N),
        "scale": 0.3,
        "impl": impl,
    }
    direct = attention_statistics(query, key, **arguments)
    r2g, g2r = accumulated(query, key, **arguments)
    assert torch.equal(r2g, direct.r2g)
    assert torch.equal(g2r, direct.g2r)


# --- masks ----------------------------------------------------------------------------------------

BIAS_SHAPES = [
    (B, H, M, N),
    (B, 1, M, N),
    (1, H, M, N),
    (B, 1, 1, N),
    (1, 1, M, 1),
    (H, 1, N),
    (M, N),
    (M, 1),
    (N,),
    (1,),
    (),
]


@pytest.mark.parametrize("shape", BIAS_SHAPES, ids=str)
def test_a_mask_of_any_broadcastable_shape_is_that_mask_in_full(impl, shape):
    query, key, value = make_qkv(B, H, M, N, D)
    additive, boolean = randn(*shape), rand(*shape) > 0.3
    for given in (additive, boolean):
        full = torch.where(given, 0.0, -torch.inf) if given.dtype == torch.bool else given
        full = full.expand(B, H, M, N).contiguous()
        output, statistics = attention_with_statistics(query, key, value, bias=given, impl=impl)
        expected_output, expected = attention_with_statistics(
            query, key, value, bias=full, impl=impl
        )
        close(statistics, expected)
        close(output, expected_output)


@pytest.mark.parametrize("bias_dtype", [*DTYPES, torch.bool], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fully_masked_rows_and_columns_are_0_and_never_nan(impl, dtype, bias_dtype):
    query, key, value = make_qkv(B, H, M, N, D, dtype=dtype)
    allowed = torch.ones(B, H, M, N, dtype=torch.bool)
    allowed[0, 0, 2], allowed[1, 2, :, 3], allowed[1, 1] = False, False, False
    bias = allowed
    if bias_dtype != torch.bool:
        bias = torch.zeros(B, H, M, N, dtype=bias_dtype).masked_fill(~allowed, -torch.inf)
    rows, votes = torch.eye(M)[None], torch.eye(N)[None]
    output, statistics = attention_with_statistics(
        query, key, value, bias=bias, query_weights=rows, key_weights=votes, impl=impl
    )
    no_row, no_column = ~allowed.any(-1), ~allowed.any(-2)
    assert torch.equal(statistics.query_lse.isneginf(), no_row)
    assert torch.equal(statistics.key_lse.isneginf(), no_column)
    assert not statistics.query_lse.isnan().any()
    assert not statistics.key_lse.isnan().any()
    # P and C themselves: nothing where masked, and each unmasked row or column still sums to 1
    assert (statistics.g2r[~allowed] == 0).all()
    assert (statistics.r2g.mT[~allowed] == 0).all()
    close(statistics.g2r.sum(-1), (~no_row).to(statistics.g2r.dtype))
    close(statistics.r2g.sum(-1), (~no_column).to(statistics.r2g.dtype))
    assert output.isfinite().all()
    assert (output[no_row] == 0).all()


def test_a_constant_mask_shifts_only_the_log_sum_exps(impl):
    query, key, _ = make_qkv(B, H, M, N, D, dtype=torch.float64)
    plain = attention_statistics(query, key, impl=impl)
    shifted = attention_statistics(query, key, bias=torch.tensor(7.5), impl=impl)
    expected = AttentionStatistics(plain.r2g, plain.g2r, plain.query_lse + 7.5, plain.key_lse + 7.5)
    close(shifted, expected, torch.float64)


# --- the attention output -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [None, "additive", "bool"])
def test_output_is_that_of_scaled_dot_product_attention(impl, dtype, mask):
    query, key, value = make_qkv(B, H, 63, 131, 40, dtype=dtype)
    bias = {None: None, "additive": randn(63, 131, dtype=dtype), "bool": rand(63, 131) > 0.3}[mask]
    output, statistics = attention_with_statistics(
        query, key, value, bias=bias, scale=0.2, impl=impl
    )
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=0.2)
    assert output.dtype == dtype
    assert output.shape == query.shape
    # in 16 bits both round once more at the end; elsewhere the rounding of the logits counts
    roundings = 2 if dtype.itemsize == 2 else 16
    ulp = torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(output, expected, rtol=0, atol=roundings * ulp)
    alone = attention_statistics(query, key, bias=bias, scale=0.2, impl=impl)
    for name in ("r2g", "key_lse"):
        close(getattr(statistics, name), getattr(alone, name))
    # P is that of the log-sum-exp that the attention call left
    normaliser, g2r = statistics.query_lse, torch.zeros_like(statistics.g2r)
    torch.testing.assert_close(normaliser, alone.query_lse, rtol=1e-5, atol=1e-5)
    options = {"bias": bias, "scale": 0.2, "normaliser": normaliser, "impl": "reference"}
    accumulate_maps(query, key, g2r=g2r, **options)
    close(statistics.g2r, g2r)


# --- in place -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_adds_in_place_to_strided_views_and_leaves_the_neighbours_alone(impl, dtype):
    query, key, _ = make_qkv(B, H, M, N, D, dtype=dtype)
    rows, votes = rand(B, 2, M), rand(B, 2, N)
    sums = torch.promote_types(dtype, torch.float32)
    # [batch, time group, seqlen, heads, rows]: the third group, every second row
    all_r2g, all_g2r = randn(B, 4, M, H, 3, dtype=sums), randn(B, 4, N, H, 3, dtype=sums)
    before = all_r2g.clone(), all_g2r.clone()

    def view(tensor):
        return tensor[:, 2, ..., ::2].permute(0, 2, 3, 1)

    r2g, g2r = view(all_r2g), view(all_g2r)
    expected = attention_statistics(query, key, query_weights=rows, key_weights=votes, impl=impl)
    for times in (1, 2):
        accumulate_maps(
            query, key, r2g=r2g, g2r=g2r, query_weights=rows, key_weights=votes, impl=impl
        )
        close(r2g, view(before[0]) + times * expected.r2g)
        close(g2r, view(before[1]) + times * expected.g2r)
    for after, old in zip((all_r2g, all_g2r), before, strict=True):
        view(after).copy_(view(old))
        assert torch.equal(after, old)


def test_none_skips_a_direction(impl):
    query, key, _ = make_qkv(B, H, M, N, D)
    both_r2g, both_g2r = accumulated(query, key, impl=impl)
    r2g, g2r = torch.zeros_like(both_r2g), torch.zeros_like(both_g2r)
    accumulate_maps(query, key, r2g=r2g, impl=impl)
    accumulate_maps(query, key, g2r=g2r, impl=impl)
    accumulate_maps(query, key, impl=impl)
    assert torch.equal(r2g, both_r2g)
    assert torch.equal(g2r, both_g2r)


def test_accumulating_returns_the_log_sum_exps(impl):
    query, key, _ = make_qkv(B, H, M, N, D)
    query_lse, key_lse = accumulate_maps(query, key, impl=impl)
    expected = attention_statistics(query, key, impl=impl)
    close(query_lse, expected.query_lse)
    close(key_lse, expected.key_lse)


def test_nan_in_an_accumulator_stays_where_it_was(impl):
    query, key, _ = make_qkv(B, H, M, N, D)
    r2g, g2r = torch.zeros(B, H, 1, M), torch.zeros(B, H, 1, N)
    r2g[0, 1, 0, 5] = g2r[1, 0, 0, 4] = torch.nan
    accumulate_maps(query, key, r2g=r2g, g2r=g2r, impl=impl)
    assert r2g.isnan().nonzero().tolist() == [[0, 1, 0, 5]]
    assert g2r.isnan().nonzero().tolist() == [[1, 0, 0, 4]]


# --- which implementation -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "hip", "default"),
    [
        ((7, 5), None, Impl.STREAMING),
        ((8, 0), None, Impl.FUSED),
        ((9, 0), None, Impl.FUSED),
        ((12, 0), None, Impl.FUSED),
        ((6, 0), "7.0", Impl.FUSED),
    ],
    ids=str,
)
def test_the_default_is_fused_where_a_gpu_runs_it(monkeypatch, capability, hip, default):
    card = SimpleNamespace(name="card", major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert implementation(None, torch.device("cuda")) is default
    assert implementation("fused", torch.device("cuda")) is Impl.FUSED


def test_the_default_is_streaming_elsewhere():
    assert implementation(None, torch.device("cpu")) is Impl.STREAMING
    assert implementation(None, torch.device("mps")) is Impl.STREAMING


@functions
@pytest.mark.parametrize(
    ("asked", "ran"),
    [
        (None, streaming),
        ("streaming", streaming),
        (Impl.STREAMING, streaming),
        ("reference", reference),
        (Impl.REFERENCE, reference),
    ],
    ids=["default", "'streaming'", "STREAMING", "'reference'", "REFERENCE"],
)
def test_the_requested_implementation_runs_and_no_other(monkeypatch, function, asked, ran):
    seen = []

    def watch(module, name):
        original = getattr(module, name)

        def spy(*args, **kwargs):
            seen.append(module)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, spy)

    for module in (streaming, reference):
        watch(module, "accumulate")
        watch(module, "attention")
    query, key, _ = make_qkv(1, 2, 5, 7, 8)
    function(query, key, impl=asked)
    assert set(seen) == {ran}


def test_fused_on_cpu_tensors_is_refused_without_the_interpreter(fork):
    code = """
import torch
from i2am import kernels
q = torch.ones(1, 1, 2, 4)
for call in (
    lambda: kernels.attention_statistics(q, q, impl="fused"),
    lambda: kernels.attention(q, q, q, impl="fused"),
    lambda: kernels.accumulate(q, q, [], impl="fused"),
):
    try:
        call()
    except RuntimeError as error:
        print(error)
"""
    lines = fork(code, TRITON_INTERPRET="0").communicate()[0].splitlines()
    assert len(lines) == 3
    assert all("impl='fused' needs tensors on a GPU" in line for line in lines)


# --- inference only -------------------------------------------------------------------------------


def test_gradients_are_refused_and_without_grad_mode_nobody_asks(impl):
    query, key, _ = make_qkv(B, H, M, N, D)
    expected = attention_statistics(query, key, impl=impl)
    query = query.clone().requires_grad_()
    with torch.no_grad():
        actual = attention_statistics(query, key, impl=impl)
    for part, wanted in zip(actual, expected, strict=True):
        assert not part.requires_grad
        assert torch.equal(part, wanted)


@functions
@pytest.mark.parametrize("asks", ["query", "key", "bias", "query_weights", "key_weights"])
def test_a_gradient_of_any_input_is_refused(function, asks):
    query, key, _ = make_qkv(B, H, M, N, D)
    inputs = {
        "query": query,
        "key": key,
        "bias": torch.zeros(M, N),
        "query_weights": torch.ones(1, 1, M),
        "key_weights": torch.ones(N),
    }
    inputs[asks] = inputs[asks].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=r"inference-only; call them under torch.no_grad"):
        function(**inputs)
    with torch.no_grad():
        function(**inputs)


def test_a_gradient_of_value_or_of_an_accumulator_is_refused():
    query, key, value = make_qkv(B, H, M, N, D)
    with pytest.raises(NotImplementedError, match="inference-only"):
        attention_with_statistics(query, key, value.clone().requires_grad_())
    r2g = torch.zeros(B, H, 1, M, requires_grad=True)
    with pytest.raises(NotImplementedError, match="inference-only"):
        accumulate_maps(query, key, r2g=r2g)
    assert (r2g == 0).all()


@functions
def test_works_in_inference_mode(impl, function):
    query, key, _ = make_qkv(B, H, M, N, D)
    expected = function(query, key, impl=impl)
    with torch.inference_mode():
        actual = function(query.clone(), key.clone(), impl=impl)
    for part, wanted in zip(actual, expected, strict=True):
        assert torch.equal(part, wanted)


def test_accumulators_from_outside_can_be_added_to_in_inference_mode(impl):
    query, key, _ = make_qkv(B, H, M, N, D)
    expected_r2g, expected_g2r = accumulated(query, key, impl=impl)
    r2g, g2r = torch.zeros(B, H, 1, M), torch.zeros(B, H, 1, N)
    with torch.inference_mode():
        accumulate_maps(query, key, r2g=r2g, g2r=g2r, impl=impl)
    assert torch.equal(r2g, expected_r2g)
    assert torch.equal(g2r, expected_g2r)


# --- torch.library and torch.compile --------------------------------------------------------------


def operator_inputs(dtype, *, bias, lse=False, probes=""):
    query, key, value = make_qkv(B, H, M, N, D, dtype=dtype)
    sums = torch.promote_types(dtype, torch.float32)
    mask = randn(M, N).expand(B, H, M, N) if bias else None
    row_lse = (query.to(sums) @ key.to(sums).mT).logsumexp(-1) if lse else None
    rows, votes = rand(1, 2, M).to(sums).expand(B, 2, M), rand(B, 2, N).to(sums)
    # transposed accumulators: the operator must cope with any strides
    kinds = {
        "r2g": Probe("queries", torch.zeros(B, H, M, 2, dtype=sums).mT, right=votes),
        "g2r": Probe("keys", torch.zeros(B, H, N, 2, dtype=sums).mT, left=rows),
        "shares": Probe("keys", torch.zeros(B, H, M, 2, dtype=sums).mT, right=votes.clone()),
        "pooled": Probe("queries", torch.zeros(B, 3, N, dtype=sums), left=POOLING),
    }
    return query, key, value, mask, row_lse, [kinds[name] for name in probes.split()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "given",
    [
        {"bias": True, "probes": "r2g g2r shares"},
        {"bias": False, "lse": True, "probes": "r2g pooled"},
        {"bias": False, "probes": "g2r"},
        {"bias": True, "lse": True},
    ],
    ids=str,
)
def test_operator_accumulate_is_registered_properly(impl, dtype, given):
    query, key, _, mask, lse, probes = operator_inputs(dtype, **given)
    torch.library.opcheck(
        torch.ops.i2am.accumulate.default, (query, key, mask, lse, *packed(probes), 1.0, impl)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_operator_attention_is_registered_properly(impl, dtype, bias):
    query, key, value, mask, *_ = operator_inputs(dtype, bias=bias)
    torch.library.opcheck(torch.ops.i2am.attention.default, (query, key, value, mask, 1.0, impl))


def flattened(result):
    """All tensors of a possibly nested tuple."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in flattened(part)]


@pytest.mark.parametrize("mask", [None, "bool"])
@pytest.mark.parametrize("chosen", [None, "reference", Impl.STREAMING], ids=repr)
def test_compiles_into_one_graph(chosen, mask):
    query, key, value = make_qkv(B, H, M, N, D)
    options = {
        "bias": None if mask is None else rand(M, N) > 0.3,
        "query_weights": rand(B, 2, M),
        "key_weights": rand(B, 2, N),
        "impl": chosen,
    }

    def direct(query, key, value):
        return attention_statistics(query * 2, key, **options)

    def beside(query, key, value):
        return attention_with_statistics(query * 2, key, value, **options)

    for function in (direct, beside):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        actual = flattened(compiled(query, key, value))
        for part, wanted in zip(actual, flattened(function(query, key, value)), strict=True):
            assert torch.equal(part, wanted)


def test_compiles_in_place_into_one_graph():
    query, key, _ = make_qkv(B, H, M, N, D)
    r2g, g2r = torch.zeros(B, 3, H, 1, M), torch.zeros(B, 3, H, 1, N)

    def step(query, key, r2g, g2r):
        accumulate_maps(query * 2, key, r2g=r2g[:, 1], g2r=g2r[:, 1])
        accumulate_maps(query, key, r2g=r2g[:, 2])

    torch.compile(step, fullgraph=True, backend="aot_eager")(query, key, r2g, g2r)
    expected_r2g, expected_g2r = torch.zeros_like(r2g), torch.zeros_like(g2r)
    step(query, key, expected_r2g, expected_g2r)
    assert expected_r2g[:, 1:].any()
    assert torch.equal(r2g, expected_r2g)
    assert torch.equal(g2r, expected_g2r)


# --- what is refused ------------------------------------------------------------------------------


def changed(**changes):
    """Arguments of a good call, some of them spoilt."""
    query, key, _ = make_qkv(B, H, M, N, D)
    return {"query": query, "key": key} | changes


REFUSED = {
    "query ndim": (changed(query=torch.ones(H, M, D)), r"query must be \[batch, .*got \(3, 23, 8"),
    "query empty": (changed(query=torch.ones(B, H, 0, D)), r"query must be .*not empty.*0, 8\)"),
    "key empty": (changed(key=torch.ones(B, H, 0, D)), r"key must be \[batch.*not empty"),
    "query dtype": (changed(query=torch.ones(B, H, M, D).int()), "query must be fp16.*int32"),
    "key dtype": (
        changed(key=torch.ones(B, H, N, D).half()),
        "key must have the dtype and device of query, torch.float32 on cpu, got torch.float16",
    ),
    "key device": (changed(key=torch.ones(B, H, N, D, device="meta")), "key must have.*on meta"),
    "batch": (changed(key=torch.ones(1, H, N, D)), "the same batch, got 2 and 1"),
    "heads": (changed(key=torch.ones(B, 1, N, D)), "the same heads, got 3 and 1"),
    "head_dim": (changed(key=torch.ones(B, H, N, D + 1)), "the same head_dim, got 8 and 9"),
    "bias shape": (changed(bias=torch.zeros(N, M)), r"bias must broadcast to .*got \(17, 23\)"),
    "bias ndim": (changed(bias=torch.zeros(1, B, H, M, N)), r"bias must broadcast to \(2, 3, 23"),
    "bias dtype": (changed(bias=torch.zeros(M, N).int()), "bias must be bool or .*int32"),
    "bias device": (
        changed(bias=torch.zeros(M, N, device="meta")),
        "bias must be on the device of query, cpu, got meta",
    ),
    "impl": (
        changed(impl="Fused"),
        "impl must be one of 'fused', 'streaming', 'reference' or None, got 'Fused'",
    ),
}

# as the convenience function names them
REFUSED_WEIGHTS = {
    "query_weights ndim": (
        changed(query_weights=torch.ones(M)),
        r"query_weights must be \[2 or 1, rows, 23\], got \(23,\)",
    ),
    "query_weights batch": (
        changed(query_weights=torch.ones(3, 1, M)),
        r"query_weights must be \[2 or 1, rows, 23\], got \(3, 1, 23\)",
    ),
    "query_weights length": (
        changed(query_weights=torch.ones(B, 1, N)),
        r"query_weights must be .*got \(2, 1, 17\)",
    ),
    "key_weights scalar": (changed(key_weights=torch.tensor(1.0)), r"key_weights must .*got \(\)"),
    "key_weights ndim": (
        changed(key_weights=torch.ones(B, 1, 1, N)),
        r"key_weights must be \[17\], \[2, 17\] or \[2 or 1, votes, 17\], got \(2, 1, 1, 17\)",
    ),
    "key_weights batch": (changed(key_weights=torch.ones(3, N)), r"key_weights must .*\(3, 17\)"),
    "key_weights length": (changed(key_weights=torch.ones(M)), r"key_weights must .*\(23,\)"),
}


@functions
@pytest.mark.parametrize(("arguments", "match"), REFUSED.values(), ids=REFUSED)
def test_refuses(function, arguments, match):
    if function is accumulated:  # sized by the good call, so that only the bad argument is wrong
        sums = {"r2g": torch.zeros(B, H, 1, M), "g2r": torch.zeros(B, H, 1, N)}
        with pytest.raises(ValueError, match=match):
            accumulate_maps(**arguments, **sums)
        assert not any(part.any() for part in sums.values())
        return
    with pytest.raises(ValueError, match=match):
        function(**arguments)


@pytest.mark.parametrize(("arguments", "match"), REFUSED_WEIGHTS.values(), ids=REFUSED_WEIGHTS)
def test_refuses_weights(arguments, match):
    with pytest.raises(ValueError, match=match):
        attention_statistics(**arguments)


def test_refuses_a_value_that_does_not_fit_the_key():
    query, key, value = make_qkv(B, H, M, N, D)
    with pytest.raises(ValueError, match=r"value must have the shape of key, .*got \(2, 3, 16, 8"):
        attention_with_statistics(query, key, value[:, :, 1:])
    with pytest.raises(ValueError, match=r"value must have the dtype .*torch.float16 on cpu"):
        attention_with_statistics(query, key, value.half())
    with pytest.raises(ValueError, match=r"value must be \[batch"):
        attention_with_statistics(query, key, value[0])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            {"r2g": torch.zeros(B, H, M)},
            r"probes\[0\].into must be \(2, 3, 1, 23\) in torch.float32 on cpu",
        ),
        ({"r2g": torch.zeros(B, H, 2, M)}, r"probes\[0\].into must be .*got \(2, 3, 2, 23\)"),
        ({"r2g": torch.zeros(B, H, 1, M).double()}, r"probes\[0\].into must be .*in torch.float64"),
        (
            {"g2r": torch.zeros(B, H, 1, M)},
            r"probes\[0\].into must be \(2, 3, 1, 17\).*got \(2, 3, 1, 23\)",
        ),
        ({"g2r": torch.zeros(B, H, 1, N, device="meta")}, r"probes\[0\].into must be .*on meta"),
        ({"normaliser": torch.zeros(B, H, N)}, r"normaliser must be \(2, 3, 23\).*\(2, 3, 17\)"),
        ({"normaliser": torch.zeros(B, H, M).half()}, r"normaliser must be .*torch.float16"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_refuses_an_accumulator_that_does_not_fit(arguments, match):
    with pytest.raises(ValueError, match=match):
        accumulate_maps(**changed(**arguments))


@pytest.mark.parametrize(
    ("name", "sums"),
    [
        ("r2g", torch.zeros(H, 1, M).expand(B, H, 1, M)),
        ("r2g", torch.zeros(B, H, 1, 1).expand(B, H, 1, M)),
        ("g2r", torch.zeros(B, 1, 1, N).expand(B, H, 1, N)),
        ("g2r", torch.zeros(200).as_strided((B, H, 1, N), (3 * 16, 16, 1, 1))),
        ("g2r", torch.zeros(200).as_strided((B, H, 1, N), (51, 17, 1, 0))),
    ],
    ids=["batch", "tokens", "heads", "by one element", "no step"],
)
def test_refuses_an_accumulator_that_overlaps_itself(impl, name, sums):
    with pytest.raises(
        ValueError, match=r"probes\[0\].into must not overlap itself, .*got strides \("
    ):
        accumulate_maps(**changed(impl=impl, **{name: sums}))
    assert not sums.any()


@pytest.mark.parametrize(
    "view",
    [
        lambda size: torch.zeros(B, 5, size, H, 2)[:, 3, ..., 1:].permute(0, 2, 3, 1),
        lambda size: torch.zeros(size, 1, H, 2 * B)[..., ::2].permute(3, 2, 1, 0),
        lambda size: torch.zeros(1, H, 1, size).as_strided((1, H, 1, size), (0, size, 0, 1)),
        # the step of an axis of one element means nothing
        lambda size: torch.zeros(B, H, 1, size).as_strided((B, H, 1, size), (H * size, size, 0, 1)),
    ],
    ids=["slices", "reversed axes", "batch of one", "one row"],
)
def test_takes_an_accumulator_whose_elements_lie_apart(impl, view):
    r2g, g2r = view(M), view(N)
    query, key, _ = make_qkv(len(r2g), H, M, N, D)
    accumulate_maps(query, key, r2g=r2g, g2r=g2r, impl=impl)
    expected = accumulated(query, key, impl=impl)
    close(r2g, expected[0])
    close(g2r, expected[1])


def test_a_log_sum_exp_that_heads_share_is_read_and_not_added_to(impl):
    query, key, _ = make_qkv(1, 1, M, N, D)
    query, key = query.expand(1, H, M, D), key.expand(1, H, N, D)
    lse = attention_statistics(query[:, :1], key[:, :1], impl=impl).query_lse.expand(1, H, M)
    accumulate_maps(query, key, normaliser=lse, impl=impl)


# --- names ----------------------------------------------------------------------------------------


def test_public_names():
    assert kernels.__all__ == sorted(kernels.__all__)
    assert [str(impl) for impl in Impl] == ["fused", "streaming", "reference"]
    assert AttentionStatistics._fields == ("r2g", "g2r", "query_lse", "key_lse")


def test_example_of_the_docstring():
    query, key = torch.randn(1, 8, 48, 40), torch.randn(1, 8, 13, 40)
    assert attention_statistics(query, key).g2r.shape == (1, 8, 1, 13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("impl", ["reference", "streaming"])
def test_the_lowest_number_of_a_dtype_masks_like_minus_infinity(dtype, impl):
    query, key, value = make_qkv(1, 2, 9, 7, 16)
    lowest = torch.zeros(9, 7, dtype=dtype)
    lowest[2] = lowest[:, 3] = torch.finfo(dtype).min
    infinite = lowest.masked_fill(lowest < 0, -torch.inf)
    output, found = attention_with_statistics(query, key, value, bias=lowest, impl=impl)
    expected_output, expected = attention_with_statistics(
        query, key, value, bias=infinite, impl=impl
    )
    assert torch.equal(output, expected_output)
    assert all(map(torch.equal, found, expected))
    assert (found.g2r[..., 3] == 0).all()
    assert (found.r2g[..., 2] == 0).all()
    assert found.query_lse[0, 0, 2] == -torch.inf


@pytest.mark.parametrize("impl", ["reference", "streaming"])
def test_autocast_changes_nothing(impl):
    query, key, value = make_qkv(1, 2, 33, 21, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, found = attention_with_statistics(query, key, value, impl=impl)
    expected_output, expected = attention_with_statistics(query, key, value, impl=impl)
    assert torch.equal(output, expected_output)
    assert all(map(torch.equal, found, expected))
