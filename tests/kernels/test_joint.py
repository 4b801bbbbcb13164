"""Pooled probes: `W P V^T` and `W C V^T`, against the ruler and what they must not depend on."""

import pytest
import torch

from i2am.kernels import Pooling, Probe, accumulate, attention_statistics, joint_streaming
from i2am.testing import (
    assert_matches_reference,
    hardware_rounding,
    make_qkv,
    peak_bytes,
)

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # numpy, under the interpreter
    pytest.mark.filterwarnings("ignore:overflow encountered"),
]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("g2r", "r2g", "g2r_per_head", "r2g_per_head")
B, H, M, N, D = 2, 3, 24, 15, 8
PAIRS = Pooling.of([(4 * i, torch.eye(2).repeat_interleave(2, 1) / 2) for i in range(6)], 24)
# bands that overlap, unequal weights, a token that is nobody's
THIRDS = Pooling.of([(0, torch.tensor([[0.2, 0.3, 0.5]])), (2, torch.rand(4, 12) + 0.1)], 15)
POOLINGS = {
    "no pooling": {},
    "queries": {"left": PAIRS},
    "keys": {"right": THIRDS},
    "both": {"left": PAIRS, "right": THIRDS},
}
poolings = pytest.mark.parametrize("pooling", POOLINGS.values(), ids=POOLINGS)


@pytest.fixture(params=["reference", "streaming", "fused"])
def impl(request):
    return request.param


def inputs(batch=B, heads=H, queries=M, keys=N, **options):
    return make_qkv(batch, heads, queries, keys, D, device=DEVICE, **options)[:2]


def probes(sums, left=None, right=None):
    """One for each accumulator, by its name."""
    over = {"g2r": "keys", "r2g": "queries"}
    return [Probe(over[name[:3]], into, left, right) for name, into in sums.items()]


def joint(
    query,
    key,
    *,
    kept=slice(None),
    impl="reference",
    exact=False,
    given=True,
    left=None,
    right=None,
    **arguments,
):
    """What is added to accumulators of 0, by name; `kept` chooses keys after the softmax, whose
    log-sum-exp is `given` as an attention call would."""
    if exact:
        query, key = query.double(), key.double()
    normaliser = None
    if given:
        normaliser = attention_statistics(query, key, impl="reference", **arguments).query_lse
    key = key[:, :, kept]
    if arguments.get("bias") is not None:
        arguments["bias"] = arguments["bias"][..., kept]
    batch, heads, queries, _ = query.shape
    cells = (left.cells if left else queries, right.cells if right else key.shape[2])
    zeros = {
        name: torch.zeros(
            (batch, *([heads] if "head" in name else []), *cells),
            dtype=torch.promote_types(query.dtype, torch.float32),
            device=query.device,
        )
        for name in NAMES
    }
    accumulate(
        query, key, probes(zeros, left, right), normaliser=normaliser, impl=impl, **arguments
    )
    return zeros


def check(query, key, impl, **arguments):
    exact = joint(query, key, exact=True, **arguments)
    eager = joint(query, key, **arguments)
    actual = joint(query, key, impl=impl, **arguments)
    rounding = hardware_rounding(query, key, scale=arguments.get("scale"))
    for name in NAMES:
        assert actual[name].dtype == torch.float32
        assert_matches_reference(
            actual[name], exact=exact[name], eager=eager[name], name=name, rounding=rounding
        )
    return actual


# --- the ruler ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@poolings
def test_error_is_at_most_twice_the_eager_error(pooling, impl, dtype):
    check(*inputs(dtype=dtype), impl, **pooling)


@poolings
def test_the_reference_reads_like_the_formulae(pooling):
    query, key = (x.double() for x in inputs())
    scores = query @ key.mT * D**-0.5
    rows, columns = pooling.get("left"), pooling.get("right")
    w = torch.eye(M).double() if rows is None else rows.dense(torch.float64)
    v = torch.eye(N).double() if columns is None else columns.dense(torch.float64)
    found = joint(query, key, **pooling)
    for name, softmax in (("g2r", scores.softmax(-1)), ("r2g", scores.softmax(-2))):
        expected = w.to(DEVICE) @ softmax @ v.to(DEVICE).mT
        torch.testing.assert_close(found[f"{name}_per_head"], expected)
        torch.testing.assert_close(found[name], expected.mean(1))


@pytest.mark.parametrize("given", [True, False], ids=["normaliser", "none"])
@pytest.mark.parametrize("logits", [15, 70, 200, 2000])
@poolings
def test_large_logits(pooling, impl, logits, given):
    query, key = inputs(logits=logits)
    exact = joint(query, key, exact=True, **pooling)
    found = joint(query, key, impl=impl, given=given, **pooling)
    # the log-sum-exps that are given were rounded at that size, and so is every score
    budget = 2 * torch.finfo(torch.float32).eps * logits
    for name in NAMES:
        error = (found[name].double() - exact[name]).abs().max() / exact[name].max()
        assert error <= budget, name


@poolings
def test_masks(pooling, impl):
    query, key = inputs()
    bias = torch.rand(1, H, M, N, device=DEVICE) > 0.3
    bias[:, 1, 5] = False  # a query that sees nothing
    bias[:, :, :, 4] = False  # a key that nobody sees
    found = check(query, key, impl, bias=bias, **pooling)
    assert not any(sums.isnan().any() for sums in found.values())


def test_a_hidden_key_is_in_no_map(impl):
    query, key = inputs()
    bias = torch.zeros(B, H, M, N, device=DEVICE)
    bias[..., 4] = -torch.inf
    for sums in joint(query, key, bias=bias, impl=impl).values():
        assert sums[..., 4].eq(0).all()
        assert sums[..., :4].gt(0).all()


@poolings
def test_some_of_the_keys_that_were_attended_to(pooling, impl):
    """Class tokens and other images take their share of the softmax without being cells."""
    query, key = inputs(keys=N + 3)
    found = check(query, key, impl, kept=slice(2, N + 2), **pooling)
    if not pooling:
        assert found["g2r"].sum(-1).lt(0.99).all()
        torch.testing.assert_close(found["r2g"].sum(-2), torch.ones(B, N, device=DEVICE))


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_scale(impl, scale):
    check(*inputs(), impl, scale=scale)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded_heads"])
def test_any_strides(impl, relayout, layout):
    query, key = (relayout(x, layout) for x in inputs())
    check(query, key, impl, **POOLINGS["both"])


@pytest.mark.parametrize("shape", [(1, 1), (1, 31), (31, 1)], ids=str)
def test_small_shapes(impl, shape):
    check(*inputs(1, 1, *shape), impl)


def test_fp64_stays_fp64():
    query, key = (x.double() for x in inputs())
    if DEVICE.type == "cuda":
        pytest.skip("streaming is the CPU's")
    exact, actual = joint(query, key), joint(query, key, impl="streaming")
    for name in NAMES:
        torch.testing.assert_close(actual[name], exact[name], rtol=1e-12, atol=1e-14)


# --- what does not show ---------------------------------------------------------------------------


@poolings
def test_it_adds(pooling, impl):
    query, key = inputs()
    once = joint(query, key, impl=impl, **pooling)
    before = {name: torch.rand_like(sums) for name, sums in once.items()}
    sums = {name: held.clone() for name, held in before.items()}
    lse = attention_statistics(query, key, impl="reference").query_lse
    accumulate(query, key, probes(sums, **pooling), normaliser=lse, impl=impl)
    for name in NAMES:
        torch.testing.assert_close(sums[name], before[name] + once[name])


def test_heads_are_optional_and_accumulators_have_any_strides(impl):
    query, key = inputs()
    all_ = joint(query, key, impl=impl)
    wide = torch.full((B, 3, N, M + 2), torch.nan, device=DEVICE)
    views = {"g2r": wide[:, 1, :, 1:-1].mT, "r2g": torch.zeros(B, M, N, device=DEVICE)}
    views["g2r"].zero_()
    lse = attention_statistics(query, key, impl="reference").query_lse
    accumulate(query, key, probes(views), normaliser=lse, impl=impl)
    for name, sums in views.items():
        assert torch.equal(sums, all_[name])
    assert wide.isnan().sum() == wide.numel() - B * M * N


@poolings
def test_two_runs_are_equal_to_the_bit(pooling, impl):
    first, second = (joint(*inputs(), impl=impl, **pooling) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


@poolings
def test_what_it_says_of_a_sample_does_not_depend_on_the_batch(pooling, impl):
    query, key = inputs()
    alone = joint(query[1:], key[1:], impl=impl, **pooling)
    query[0] *= 100  # out of the range of one exponential
    batch = joint(query, key, impl=impl, **pooling)
    for name in NAMES:
        assert torch.equal(batch[name][1:], alone[name])


@poolings
def test_tiles_do_not_show(monkeypatch, pooling):
    """The same maps from tiles of a few queries of one head."""
    query, key = inputs()
    whole = joint(query, key, impl="streaming", **pooling)
    monkeypatch.setattr(joint_streaming, "TILE_ELEMENTS", 40)
    monkeypatch.setattr("i2am.kernels.streaming.TILE_ELEMENTS", 40)
    tiled = joint(query, key, impl="streaming", **pooling)
    for name in NAMES:
        torch.testing.assert_close(tiled[name], whole[name], rtol=1e-6, atol=1e-8)


def test_transient_memory_is_a_few_tiles():
    query, key = make_qkv(1, 8, 768, 1536, 40)[:2]
    pooling = Pooling.of([(48 * i, torch.full((12, 48), 1 / 48)) for i in range(32)], 1536)
    sums = {name: torch.zeros(1, 768, 384) for name in NAMES[:2]}

    def call():
        accumulate(query, key, probes(sums, right=pooling), impl="streaming")

    # the matrix of all heads has 36 MiB
    assert peak_bytes(call) < 16 * 2**20


# --- poolings -------------------------------------------------------------------------------------


def test_a_pooling_is_its_dense_matrix():
    dense = THIRDS.dense(torch.float64)
    assert dense.shape == (THIRDS.cells, THIRDS.size) == (5, 15)
    torch.testing.assert_close(dense[0, :3], torch.tensor([0.2, 0.3, 0.5]).double())
    assert dense[0, 3:].eq(0).all()
    assert dense[1:, :2].eq(0).all()
    assert dense[1:, 2:14].gt(0).all()
    assert dense[:, 14].eq(0).all()


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ([(0, torch.eye(2)[:, :1])], "every cell must have a weight other than 0"),
        ([(0, torch.ones(0, 2))], "every cell must have a weight other than 0"),
        ([(2, torch.ones(1, 2))], "a band must lie within 3 tokens, got 2 to 4"),
        ([(-1, torch.ones(1, 2))], "a band must lie within 3 tokens, got -1 to 1"),
    ],
)
def test_poolings_that_are_refused(bands, message):
    with pytest.raises(ValueError, match=message):
        Pooling.of(bands, 3)


# --- what is refused ------------------------------------------------------------------------------

Q, K = make_qkv(B, H, M, N, D)[:2]
POOLED = torch.zeros(B, M, N)


def probe(**changes):
    return Probe(**{"over": "keys", "into": POOLED} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"into": torch.zeros(B, N, M)},
            r"probes\[0\].into must be \(2, 24, 15\) in torch.float32",
        ),
        ({"into": POOLED.double()}, r"probes\[0\].into must be .* got .* in torch.float64"),
        ({"into": torch.zeros(1, B, H, M, N)}, r"probes\[0\].into must be \(2, 3, 24, 15\)"),
        ({"into": torch.zeros(M, N).expand(B, M, N)}, r"probes\[0\].into must not overlap itself"),
        ({"into": torch.zeros(B, 1, M, N).expand(B, H, M, N)}, r"into must not overlap itself"),
        ({"left": THIRDS}, r"probes\[0\].left must pool 24 tokens, got a pooling of 15"),
        ({"right": PAIRS}, r"probes\[0\].right must pool 15 tokens, got a pooling of 24"),
        ({"right": THIRDS}, r"probes\[0\].into must be \(2, 24, 5\)"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        accumulate(Q, K, [probe(**changes)])


def test_what_has_no_pooling_yet_is_refused_before_anything_is_added():
    good, bad = torch.zeros(B, M, N), torch.zeros(B, H, M, N + 1)
    with pytest.raises(ValueError, match=r"probes\[1\].into must be \(2, 3, 24, 15\)"):
        accumulate(Q, K, [probe(into=good), probe(into=bad)])
    assert not good.any()


def test_refuses_gradients():
    with pytest.raises(NotImplementedError, match="inference-only"):
        accumulate(Q.clone().requires_grad_(), K, [probe()])


def test_fused_refuses_fp64():
    query, key, into = (x.to(DEVICE, torch.float64) for x in (Q, K, POOLED))
    with pytest.raises(ValueError, match=r"impl='fused' computes in fp32"):
        accumulate(query, key, [probe(into=into)], impl="fused")
