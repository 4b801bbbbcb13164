"""What is read of a softmax, whoever computes it: the identities that hold of every probe."""

import pytest
import torch

from i2am.kernels import Over, Pooling, Probe, accumulate, attention
from i2am.testing import assert_matches_reference, hardware_rounding, make_qkv

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # numpy, under the interpreter
    pytest.mark.filterwarnings("ignore:overflow encountered"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
B, H, M, D = 2, 2, 35, 16
# few keys and many have schedules of their own
keys = pytest.mark.parametrize("N", [21, 140], ids=["few keys", "many keys"])
INF = float("inf")


@pytest.fixture(params=["reference", "streaming", "fused"])
def impl(request):
    return request.param


def tokens(N, **options):
    return make_qkv(B, H, M, N, D, device=DEVICE, **options)[:2]


def groups_of(N, count=3):
    """Groups that cover all keys, and one that is empty; 0 and 1."""
    which = torch.arange(N, device=DEVICE) % count
    return (which == torch.arange(count + 1, device=DEVICE)[:, None]).float()[None]


def fields_of(N):
    """Values as they come: ones, a coordinate, squares, norms of both signs.

    Not more than share a launch with the votes of `fused`.
    """
    y, x = torch.arange(N, device=DEVICE) // 5, torch.arange(N, device=DEVICE) % 5
    norms = torch.randn(N, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return torch.stack([torch.ones_like(norms), y, y**2 + x**2, norms])[None].float()


def read(query, key, values, **options):
    """`P V^T`"""
    dtype = torch.promote_types(query.dtype, torch.float32)
    shares = query.new_zeros(*query.shape[:2], values.shape[1], query.shape[2], dtype=dtype)
    if options.get("normaliser") is not None:
        options["normaliser"] = options["normaliser"].to(dtype)
    accumulate(query, key, [Probe(Over.KEYS, shares, right=values)], **options)
    return shares


def everything(query, key, values=None, **options):
    """Every reading of a call in one: `W P`, `C V^T`, `P V^T` and both pooled ones, by name."""
    batch, heads, seqlen_q, _ = query.shape
    seqlen_k = key.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    values = fields_of(seqlen_k) if values is None else values
    generator = torch.Generator().manual_seed(2)
    rows = torch.rand(1, 2, seqlen_q, generator=generator).to(DEVICE)
    cells = Pooling.of([(5 * i, torch.ones(1, 5) / 5) for i in range(seqlen_q // 5)], seqlen_q)
    sums = {
        "w p": torch.zeros(batch, heads, 2, seqlen_k),
        "c v": torch.zeros(batch, heads, values.shape[1], seqlen_q),
        "p v": torch.zeros(batch, heads, values.shape[1], seqlen_q),
        "w p v": torch.zeros(batch, heads, cells.cells, seqlen_k),
        "w c v": torch.zeros(batch, cells.cells, seqlen_k),
    }
    sums = {name: into.to(DEVICE, dtype) for name, into in sums.items()}
    probes = [
        Probe("keys", sums["w p"], left=rows),
        Probe("queries", sums["c v"], right=values),
        Probe("keys", sums["p v"], right=values),
        Probe("keys", sums["w p v"], left=cells),
        Probe("queries", sums["w c v"], left=cells),
    ]
    if options.get("normaliser") is not None:
        options["normaliser"] = options["normaliser"].to(dtype)
    query_lse, key_lse = accumulate(query, key, probes, **options)
    return {**sums, "query_lse": query_lse, "key_lse": key_lse}


def check(query, key, impl, *, large=False, **options):
    """Every reading against the fp64 reference, by twice the error of the same formulae."""
    exact = everything(query.double(), key.double(), impl="reference", **options)
    eager = everything(query, key, impl="reference", **options)
    actual = everything(query, key, impl=impl, **options)
    rounding = hardware_rounding(query, key, scale=options.get("scale"))
    for name, found in actual.items():
        assert found.dtype == torch.float32
        if large and name.startswith("w ") and name.endswith(" v"):
            continue  # test_joint.py has their budget: they take the log-sum-exps as rounded
        assert_matches_reference(
            found, exact=exact[name], eager=eager[name], name=name, rounding=rounding
        )
    return actual


# --- the shares of attention ----------------------------------------------------------------------


@keys
@dtypes
def test_error_is_at_most_twice_the_eager_error(impl, dtype, N):
    check(*tokens(N, dtype=dtype), impl)


@keys
def test_shares_are_the_attention_of_their_values(impl, N):
    query, key = tokens(N)
    for values in (groups_of(N), fields_of(N)):
        padded = torch.zeros(B, H, N, D, device=DEVICE)
        padded[..., : values.shape[1]] = values[0].mT
        output, _ = attention(query, key, padded, impl="reference")
        expected = output[..., : values.shape[1]].mT
        found = read(query, key, values, impl=impl)
        torch.testing.assert_close(found, expected, rtol=3e-6, atol=3e-6)


@keys
@pytest.mark.parametrize("logits", [None, 40, 200])
def test_shares_of_groups_that_cover_all_keys_sum_to_1(impl, logits, N):
    query, key = tokens(N, logits=logits)
    shares = read(query, key, groups_of(N), impl=impl)
    # the score itself is rounded at its own size
    torch.testing.assert_close(
        shares.sum(2), torch.ones(B, H, M, device=DEVICE), rtol=0, atol=1e-6 + 2e-7 * (logits or 0)
    )
    assert shares.ge(0).all()
    assert shares[:, :, -1].eq(0).all()  # the empty group


@pytest.mark.parametrize("N", [1, 140])
def test_all_keys_take_all(impl, N):
    query, key = tokens(N)
    shares = read(query, key, torch.ones(1, 1, N), impl=impl)
    torch.testing.assert_close(shares, torch.ones_like(shares), rtol=0, atol=2e-6)


@keys
@pytest.mark.parametrize("logits", [70, 200, -200])
def test_large_logits(impl, logits, N):
    query, key = tokens(N, logits=abs(logits))
    check(query, key, impl, large=True, scale=(1 if logits > 0 else -1) * D**-0.5)


@keys
@pytest.mark.parametrize("normalised", [False, True])
def test_columns_out_of_the_range_of_one_exponential(impl, normalised, N):
    """`P` from the exponentials of `C` would be 0 * inf there, or lose what matters."""
    query, key = tokens(N)
    bias = torch.zeros(M, N, device=DEVICE)
    bias[:, 3], bias[:, 5], bias[10:], bias[:, 7] = -200.0, 200.0, -150.0, -INF
    bias[20:30, 9] = 300.0
    normaliser = None
    if normalised:
        normaliser = attention(query.double(), key.double(), key.double(), bias=bias)[1]
    check(query, key, impl, large=True, bias=bias, normaliser=normaliser)


@keys
def test_masks(impl, N):
    query, key = tokens(N)
    bias = torch.rand(B, H, M, N, generator=torch.Generator().manual_seed(3)).to(DEVICE) > 0.3
    bias[:, :, 5], bias[..., 4], bias[0, 0] = False, False, False
    found = check(query, key, impl, bias=bias)
    assert not any(sums.isnan().any() for sums in found.values())
    assert found["p v"][:, :, :, 5].eq(0).all()
    assert found["p v"][0, 0].eq(0).all()
    assert found["w p"][..., 4].eq(0).all()
    assert read(query, key, torch.eye(N)[None, 4:5], bias=bias, impl=impl).eq(0).all()


@keys
@pytest.mark.parametrize("count", [1, 5, 40])
def test_any_number_of_groups(impl, count, N):
    query, key = tokens(N, dtype=torch.float16)
    values = torch.randn(B, count, N, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    check(query, key, impl, values=values)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded_heads"])
@keys
def test_any_strides(impl, relayout, layout, N):
    check(*(relayout(x, layout) for x in tokens(N)), impl)


def test_fp64_stays_fp64():
    if DEVICE.type == "cuda":
        pytest.skip("streaming is the CPU's")
    query, key = (x.double() for x in tokens(140))
    for logits in (1, 100):
        exact = everything(logits * query, key, impl="reference")
        for name, found in everything(logits * query, key, impl="streaming").items():
            torch.testing.assert_close(found, exact[name], rtol=1e-11, atol=1e-13)


# --- the normaliser -------------------------------------------------------------------------------


@pytest.mark.parametrize("span", [slice(3, 20), slice(30, 139), slice(50, 51)], ids=str)
@pytest.mark.parametrize("logits", [None, 30, 200])
def test_a_span_of_the_keys_is_that_part_of_the_softmax(impl, logits, span):
    query, key = tokens(140, logits=logits)
    normaliser = attention(query.double(), key.double(), key.double(), impl="reference")[1]
    whole = everything(query.double(), key.double(), impl="reference", normaliser=normaliser)
    given = normaliser.float()
    found = check(query, key[:, :, span], impl, large=logits is not None, normaliser=given)
    # the normaliser was rounded at its size, which C knows nothing of
    size = 1e-6 + torch.finfo(torch.float32).eps * (logits or 0)
    for name in ("w p", "w p v", "w c v"):
        torch.testing.assert_close(
            found[name].double(), whole[name][..., span], rtol=0, atol=2 * size
        )
    torch.testing.assert_close(
        found["key_lse"].double(), whole["key_lse"][..., span], rtol=1e-6, atol=1e-6
    )
    assert found["query_lse"] is given


@pytest.mark.parametrize("span", [slice(0, 20), slice(30, 139)], ids=str)
@pytest.mark.parametrize("bias", [None, -300.0], ids=["seen", "hardly seen"])
def test_the_share_of_a_span_is_the_ratio_of_its_sum(impl, span, bias):
    query, key = (x.double() for x in tokens(140))
    mask = None
    if bias is not None:
        mask = torch.zeros(140, device=DEVICE, dtype=torch.float64)
        mask[span] = bias
    parts = {"impl": "reference", "bias": mask}
    whole = attention(query, key, key, **parts)[1]
    own = attention(
        query,
        key[:, :, span],
        key[:, :, span],
        impl="reference",
        bias=None if mask is None else mask[span],
    )[1]
    shares = read(
        query.float(),
        key[:, :, span].float(),
        torch.ones(1, 1, span.stop - span.start),
        normaliser=whole,
        bias=None if mask is None else mask[span].float(),
        impl=impl,
    )
    torch.testing.assert_close(shares[:, :, 0].double(), (own - whole).exp(), rtol=0, atol=2e-6)


@keys
@pytest.mark.parametrize("left", [-INF, 0.0], ids=str)
def test_a_masked_row_has_nothing_whatever_its_normaliser(impl, left, N):
    """What attention calls leave there: PyTorch's on the CPU some finite number."""
    query, key = tokens(N)
    bias = torch.zeros(M, 1, device=DEVICE)
    bias[7] = -INF
    normaliser = attention(query, key, key, bias=bias, impl="reference")[1]
    assert normaliser[:, :, 7].isneginf().all()
    normaliser[:, :, 7] = left
    found = check(query, key, impl, bias=bias, normaliser=normaliser)
    assert found["p v"][..., 7].eq(0).all()
    assert found["c v"][..., 7].eq(0).all()


# --- poolings and declared rows -------------------------------------------------------------------


@keys
def test_pooled_rows_are_declared_rows(impl, N):
    query, key = tokens(N)
    cells = Pooling.of([(7 * i, torch.ones(1, 7) / 7) for i in range(5)], M)
    rows = cells.dense(torch.float32)[None]
    declared = torch.zeros(B, H, 5, N, device=DEVICE)
    every, mean = torch.zeros_like(declared), torch.zeros(B, 5, N, device=DEVICE)
    probes = [
        Probe("keys", declared, left=rows),
        Probe("keys", every, left=cells),
        Probe("keys", mean, left=cells),
    ]
    accumulate(query, key, probes, impl=impl)
    torch.testing.assert_close(every, declared, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(mean, declared.mean(1), rtol=1e-5, atol=1e-7)


# --- together, again, in other batches ------------------------------------------------------------


def some(over, count, N, seed):
    weights = torch.rand(
        1, count, M if over == "w" else N, generator=torch.Generator().manual_seed(seed)
    )
    into = torch.zeros(B, H, count, N if over == "w" else M, device=DEVICE)
    return {
        "w": lambda: Probe("keys", into, left=weights),
        "c": lambda: Probe("queries", into, right=weights),
        "p": lambda: Probe("keys", into, right=weights),
    }[over]()


@keys
def test_several_probes_of_a_kind_are_each_added_to_their_own(impl, N):
    query, key = tokens(N)
    wanted = ["w", "c", "c", "p", "w", "p", "p"]

    def probes():
        return [some(kind, 1 + i % 3, N, i) for i, kind in enumerate(wanted)]

    together = probes()
    accumulate(query, key, together, impl=impl)
    for probe, alone in zip(together, probes(), strict=True):
        accumulate(query, key, [alone], impl=impl)
        torch.testing.assert_close(probe.into, alone.into, rtol=1e-5, atol=1e-7)
        assert alone.into.any()


@keys
def test_it_adds_to_any_strides_and_touches_nothing_else(impl, N):
    query, key = tokens(N)
    wide = torch.full((B, M, 5, H + 1, 2), torch.nan, device=DEVICE)
    view = wide[:, :, 1:4, 1:, 0].permute(0, 3, 2, 1)
    view.fill_(0.5)
    values = groups_of(N)[:, :3]
    accumulate(query, key, [Probe("keys", view, right=values)], impl=impl)
    torch.testing.assert_close(view - 0.5, read(query, key, values, impl=impl))
    assert wide.isnan().sum() == wide.numel() - view.numel()


@keys
@pytest.mark.parametrize("known", [False, True], ids=["alone", "normaliser"])
@pytest.mark.parametrize("logits", [None, 200])
def test_equal_to_the_bit_again_and_in_another_batch(impl, known, logits, N):
    query, key = tokens(N, logits=logits)
    lse = attention(query, key, key, impl="reference")[1] if known else None
    whole, again = (everything(query, key, normaliser=lse, impl=impl) for _ in range(2))
    query[0] *= 100
    if known:
        lse = torch.cat([attention(query, key, key, impl="reference")[1][:1], lse[1:]])
    other = everything(query, key, normaliser=lse, impl=impl)
    for name, first in whole.items():
        assert torch.equal(first, again[name]), name
        if impl != "reference":
            assert torch.equal(first[1], other[name][1]), name


# --- what is refused ------------------------------------------------------------------------------

Q, K = make_qkv(B, H, M, 21, D)[:2]
ROWS, GROUPS = torch.ones(1, 1, M), torch.ones(1, 1, 21)
CELLS = Pooling.of([(0, torch.ones(1, M))], M)
ON_KEYS, ON_QUERIES = torch.zeros(B, H, 1, 21), torch.zeros(B, H, 1, M)


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        (Probe("rows", ON_KEYS), r"probes\[0\].over must be 'keys' or 'queries', got 'rows'"),
        (Probe("queries", ON_KEYS, left=ROWS), "must be over 'keys' where left is a tensor, got"),
        (Probe("keys", ON_KEYS, ROWS, GROUPS), "nothing on the other, or poolings, got a tensor"),
        (Probe("keys", ON_KEYS, CELLS, GROUPS), "got a pooling on the left and a tensor on the r"),
        (Probe("keys", ON_KEYS, left=ROWS[0]), r"left must be \[2 or 1, rows, 35\], got \(1, 35\)"),
        (Probe("keys", ON_KEYS, left=GROUPS), r"left must be \[2 or 1, rows, 35\], got \(1, 1, 21"),
        (
            Probe("keys", ON_QUERIES, right=ROWS),
            r"right must be \[2 or 1, groups, 21\], got \(1, 1",
        ),
        (Probe("keys", ON_KEYS, right=GROUPS), r"into must be \(2, 2, 1, 35\) in torch.float32"),
        (Probe("keys", ON_QUERIES[:, 0], right=GROUPS), r"into must be \(2, 2, 1, 35\)"),
        (Probe("keys", ON_QUERIES[:, :1].expand(B, H, 1, M), right=GROUPS), "must not overlap its"),
    ],
)
def test_refuses(probe, message):
    with pytest.raises(ValueError, match=message):
        accumulate(Q, K, [probe])
    with pytest.raises(NotImplementedError, match="inference-only"):
        accumulate(Q, K, [Probe("keys", ON_QUERIES, right=GROUPS.clone().requires_grad_())])
