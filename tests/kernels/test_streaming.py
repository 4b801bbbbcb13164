"""The CPU path against the ruler: the fp64 reference, with twice the eager error as the budget."""

import math
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F

from i2am.kernels import (
    attention_statistics,
    native,
    streaming,
)
from i2am.testing import (
    accumulate_maps,
    assert_matches_reference,
    attention_with_statistics,
    make_qkv,
    peak_bytes,
)

# a GPU machine may have torch, triton, numpy and pytest alone; these tests are the CPU's
hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
Statistics = namedtuple("Statistics", "r2g g2r shares query_lse key_lse")
LAYOUTS = [
    "unet",
    "contiguous",
    "transposed",
    "sliced",
    "expanded_batch",
    "expanded_heads",
    "expanded_tokens",
]


def statistics(query, key, *, normaliser=None, values=None, impl="reference", **arguments):
    """What is read of a call: `attention_statistics`, and `P V^T` where there are values."""
    batch, heads, seqlen_q, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    rows, votes = arguments.get("query_weights"), arguments.get("key_weights")
    sizes = [
        (1 if votes is None or votes.ndim < 3 else votes.shape[1], seqlen_q),
        (1 if rows is None else rows.shape[1], key.shape[2]),
        (0 if values is None else values.shape[1], seqlen_q),
    ]
    r2g, g2r, shares = (torch.zeros(batch, heads, *size, dtype=dtype) for size in sizes)
    if values is not None:
        values = {"shares": shares, "values": values}
    lse = accumulate_maps(
        query,
        key,
        r2g=r2g,
        g2r=g2r,
        normaliser=None if normaliser is None else normaliser.to(dtype),
        impl=impl,
        **(values or {}),
        **arguments,
    )
    return Statistics(r2g, g2r, shares, *lse)


def eager_results(query, key, *, scale=None, **arguments):
    """The formulae in the working dtype, in every order of operations that people use."""
    compute = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # the scale on the product, and on the query as in PyTorch's attention
    return [
        statistics(query, key, scale=scale, **arguments),
        statistics(query.to(compute) * scale, key.to(compute), scale=1.0, **arguments),
    ]


def worst(results, exact):
    """Whichever of the results is farthest from the exact one."""
    if exact.numel() == 0:
        return results[0]
    return max(results, key=lambda result: (result.double() - exact).nan_to_num(0).abs().max())


def check(query, key, **arguments):
    """Streaming statistics, after holding them against the ruler."""
    exact = statistics(query.double(), key.double(), **arguments)
    eager = eager_results(query, key, **arguments)
    actual = statistics(query, key, impl="streaming", **arguments)
    if query.dtype == torch.float64:
        torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-12)
        return actual
    for name in exact._fields:
        ruler = getattr(exact, name)
        budget = worst([getattr(result, name) for result in eager], ruler)
        assert_matches_reference(getattr(actual, name), exact=ruler, eager=budget, name=name)
    return actual


def row_lse(query, key, **arguments):
    """The log-sum-exp that the model's own attention call would have handed over."""
    return native.attention_with_lse(query, key, key, **arguments)[1]


@pytest.fixture
def routes(monkeypatch):
    """Names the routes that ran, in order; a refused shared exponential is "refused"."""
    seen = []

    def watch(name):
        original = getattr(streaming._Sweep, name)

        def spy(self, *args, **options):
            result = original(self, *args, **options)
            seen.append("refused" if result is False else name.strip("_"))
            return result

        monkeypatch.setattr(streaming._Sweep, name, spy)

    for name in ("query_blocks", "key_blocks", "_shared_exponential", "_separate_exponentials"):
        watch(name)
    return seen


@pytest.fixture
def tiles(monkeypatch):
    """Shapes `[heads, queries, keys]` of all tiles that were computed."""
    seen = []
    original = streaming._Sweep._scores

    def spy(self, *args, **options):
        scores = original(self, *args, **options)
        seen.append(tuple(scores.shape))
        return scores

    monkeypatch.setattr(streaming._Sweep, "_scores", spy)
    return seen


def test_the_poison_bites(poisoned_memory):
    like = torch.ones(3)
    for fresh in (torch.empty(5), like.new_empty(5), torch.empty_like(like), like.new_empty(0)):
        assert fresh.isnan().all()
    query, key, _ = make_qkv(1, 1, 3, 4, 8)
    # an accumulator that nobody set to 0: what is added to it cannot come out as a number
    r2g, g2r = torch.empty(1, 1, 1, 3), torch.empty(1, 1, 1, 4)
    lse = accumulate_maps(query, key, r2g=r2g, g2r=g2r, impl="streaming")
    assert r2g.isnan().all()
    assert g2r.isnan().all()
    # while everything that the implementation allocates itself is written before it is read
    assert not any(part.isnan().any() for part in lse)


# --- the ruler ------------------------------------------------------------------------------------

SHAPES = [(1, 1), (1, 7), (7, 1), (63, 131), (131, 63), (1037, 131), (131, 1037), (64, 77)]


LOGITS = [None, 10, 40, 80, 200]


@pytest.mark.parametrize(
    ("shape", "logits", "dtype"),
    # every two of them meet
    [
        (shape, logits, DTYPES[(row + column) % len(DTYPES)])
        for row, shape in enumerate(SHAPES)
        for column, logits in enumerate(LOGITS)
    ],
    ids=str,
)
def test_error_is_at_most_twice_the_eager_error(shape, logits, dtype):
    query, key, _ = make_qkv(1, 2, *shape, 40, dtype=dtype, logits=logits)
    if logits is not None:
        scores = query.double() @ key.double().mT / 40**0.5
        assert scores.abs().max() > 0.98 * logits
    check(query, key)


@pytest.mark.parametrize("head_dim", [1, 40, 64, 72, 80, 96, 128, 160])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_any_head_dim(head_dim, dtype):
    query, key, _ = make_qkv(2, 2, 63, 131, head_dim, dtype=dtype)
    check(query, key, query_weights=torch.rand(1, 2, 63), key_weights=torch.rand(131))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_the_layer_of_the_custom_model(dtype):
    query, key, _ = make_qkv(1, 1, 3072, 1037, 40, dtype=dtype)
    votes = torch.ones(1037)
    votes[0] = 0
    check(query, key, key_weights=votes / votes.sum())


@pytest.mark.parametrize("offset", [300.0, -300.0], ids=["takes all", "takes nothing"])
def test_one_key_takes_all_mass_or_none(offset):
    query, key, _ = make_qkv(1, 2, 63, 131, 40)
    bias = torch.zeros(131)
    bias[17] = offset
    actual = check(query, key, bias=bias)
    torch.testing.assert_close(
        actual.g2r[..., 17], torch.full((1, 2, 1), 1.0 if offset > 0 else 0.0)
    )


@pytest.mark.parametrize("key_layout", LAYOUTS)
@pytest.mark.parametrize("query_layout", LAYOUTS)
def test_strides_do_not_matter(relayout, query_layout, key_layout):
    query, key, value = make_qkv(2, 2, 13, 9, 5)
    query, key = relayout(query, query_layout), relayout(key, key_layout)
    value = relayout(value, key_layout)
    check(query, key)
    output, _ = attention_with_statistics(query, key, value, impl="streaming")
    expected, _ = attention_with_statistics(
        query.contiguous(), key.contiguous(), value.contiguous(), impl="streaming"
    )
    torch.testing.assert_close(output, expected)


@st.composite
def calls(draw):
    """A call with everything drawn: sizes, dtype, range, strides, mask, weights, tile size."""
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    length = st.one_of(st.integers(1, 40), st.sampled_from([1, 63, 64, 65]))
    seqlen_q, seqlen_k = draw(length), draw(length)
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 2**31))
    query, key, _ = make_qkv(
        batch,
        heads,
        seqlen_q,
        seqlen_k,
        draw(st.sampled_from([1, 3, 8, 40, 72])),
        dtype=dtype,
        seed=seed,
        logits=draw(st.sampled_from([None, 10.0, 40.0, 80.0, 200.0])),
    )
    # not equal tokens: there the errors of the eager formulae cancel, and with them the budget
    layout = st.sampled_from(LAYOUTS[:-1])
    layouts = draw(layout), draw(layout)
    generator = torch.Generator().manual_seed(seed)
    arguments = {}
    bias = draw(st.sampled_from([None, "additive", "bool", "both"]))
    if bias is not None:
        shape = [size if draw(st.booleans()) else 1 for size in (batch, heads, seqlen_q, seqlen_k)]
        shape = shape[draw(st.integers(0, 3)) :]
        allowed = torch.rand(shape, generator=generator) > draw(st.sampled_from([0.1, 0.6, 0.95]))
        numbers = 5 * torch.randn(shape, generator=generator).to(draw(st.sampled_from(DTYPES)))
        arguments["bias"] = {
            "additive": numbers,
            "bool": allowed,
            "both": numbers.masked_fill(~allowed, -torch.inf),
        }[bias]
    if draw(st.booleans()):
        rows = (draw(st.sampled_from([1, batch])), draw(st.integers(0, 4)), seqlen_q)
        arguments["query_weights"] = torch.rand(rows, generator=generator)
    if draw(st.booleans()):
        votes = draw(
            st.sampled_from(
                [
                    (seqlen_k,),
                    (1, seqlen_k),
                    (batch, seqlen_k),
                    (1, 2, seqlen_k),
                    (batch, 3, seqlen_k),
                ]
            )
        )
        voting = torch.rand(votes, generator=generator) > 0.3
        arguments["key_weights"] = torch.rand(votes, generator=generator) * voting
    if seed % 4:
        groups = (batch if seed % 2 else 1, seed % 4, seqlen_k)
        arguments["values"] = torch.rand(groups, generator=generator)
    # all in one tile, a head in one tile, or a head in a few
    blocks = draw(st.sampled_from([None, 1, 2, 5]))
    tile = streaming.TILE_ELEMENTS if blocks is None else -(-seqlen_q * seqlen_k // blocks)
    # exponentials of several blocks are kept, or made twice
    kept = draw(st.sampled_from([tile, streaming.KEPT_ELEMENTS]))
    return query, key, layouts, arguments, {"TILE_ELEMENTS": tile, "KEPT_ELEMENTS": kept}


@settings(derandomize=True, max_examples=150)
@given(call=calls())
def test_any_call_stays_within_the_budget(relayout, call):
    query, key, layouts, arguments, budget = call
    query, key = relayout(query, layouts[0]), relayout(key, layouts[1])
    with pytest.MonkeyPatch.context() as patch:
        for name, elements in budget.items():
            patch.setattr(streaming, name, elements)
        check(query, key, **arguments)


@settings(derandomize=True, max_examples=100)
@given(call=calls())
def test_any_part_of_the_keys_stays_within_the_budget(relayout, call):
    """The normaliser of all keys, and some of them: a span, or all."""
    query, key, layouts, arguments, budget = call
    query, key = relayout(query, layouts[0]), relayout(key, layouts[1])
    whole = {name: arguments.get(name) for name in ("bias", "scale")}
    normaliser = statistics(query.double(), key.double(), **whole).query_lse.float()
    length = key.shape[2]
    span = slice(length // 3, max(1, length - length // 4)) if length % 2 else slice(None)
    parts = {
        name: arguments[name][..., span] for name in ("key_weights", "values") if name in arguments
    }
    if whole["bias"] is not None and whole["bias"].shape[-1] > 1:
        parts["bias"] = whole["bias"][..., span]
    with pytest.MonkeyPatch.context() as patch:
        for name, elements in budget.items():
            patch.setattr(streaming, name, elements)
        check(query, key[:, :, span], normaliser=normaliser, **arguments | parts)


# --- the routes -----------------------------------------------------------------------------------

M, N = 67, 41
ONE_TILE = streaming.TILE_ELEMENTS
TEN_QUERIES, TEN_KEYS = 10 * N, 10 * M


@pytest.fixture
def tile_elements(monkeypatch):
    """Sets the elements of a tile, and of what may be kept: by default no more than that."""

    def budget(elements, kept=None):
        monkeypatch.setattr(streaming, "TILE_ELEMENTS", elements)
        monkeypatch.setattr(streaming, "KEPT_ELEMENTS", elements if kept is None else kept)

    return budget


def with_votes(bias=None):
    return {
        "bias": bias,
        "query_weights": torch.rand(1, 3, M),
        "key_weights": torch.rand(1, 2, N),
        "values": torch.stack([torch.ones(N), torch.arange(N) / N])[None],
    }


def row_bias(value, start):
    bias = torch.zeros(M, N)
    bias[start:] = value
    return bias


@pytest.mark.parametrize(
    "tile", [ONE_TILE, M * N, TEN_QUERIES, 1], ids=["heads", "head", "10", "1"]
)
def test_moderate_logits_share_one_exponential(routes, tiles, tile_elements, tile):
    tile_elements(tile)
    query, key, _ = make_qkv(1, 3, M, N, 40)
    check(query, key, **with_votes())
    groups = 1 if tile == ONE_TILE else 3
    assert routes == ["shared_exponential"] * groups + ["query_blocks"]
    largest = {ONE_TILE: (3, M, N), M * N: (1, M, N), TEN_QUERIES: (1, 10, N), 1: (1, 1, N)}
    assert max(tiles) == largest[tile]
    # a head in one tile is computed once; otherwise the second softmax needs a second sweep
    blocks = {ONE_TILE: 1, M * N: 1, TEN_QUERIES: 7, 1: M}[tile]
    assert len(tiles) == groups * (blocks if blocks == 1 else 2 * blocks)


def test_exponentials_that_may_be_kept_are_made_once(routes, tiles, tile_elements):
    tile_elements(TEN_QUERIES, kept=2 * M * N)
    query, key, _ = make_qkv(1, 3, M, N, 40)
    check(query, key, **with_votes())
    assert routes == ["shared_exponential"] * 3 + ["query_blocks"]
    assert len(tiles) == 3 * 7


def test_a_block_of_queries_takes_the_regions_that_see_it(tile_elements, monkeypatch):
    """Many weight rows, 0 on most queries: one per query, a uniform one, and some that see none."""
    tile_elements(TEN_QUERIES)
    query, key, _ = make_qkv(1, 2, M, N, 40)
    weights = torch.cat([torch.full((1, M), 1 / M), torch.eye(M), torch.zeros(3, M)])
    rows = []
    original = streaming._Sweep._weights

    def spy(self, queries):
        seen, chosen = original(self, queries)
        rows.append(len(chosen))
        return seen, chosen

    monkeypatch.setattr(streaming._Sweep, "_weights", spy)
    check(query, key, query_weights=weights[None])
    check(query, key, query_weights=weights[None], normaliser=row_lse(query, key))
    assert set(rows) == {1 + 10, 1 + M % 10}
    large = 100 * query  # an exponential for each softmax
    check(large, key, query_weights=weights[None])


@pytest.mark.parametrize("tile", [ONE_TILE, TEN_QUERIES], ids=["one tile", "blocks"])
@pytest.mark.parametrize("logits", [80, 200])
def test_large_logits_get_an_exponential_for_each_softmax(routes, tile_elements, tile, logits):
    tile_elements(tile)
    query, key, _ = make_qkv(1, 1, M, N, 40, logits=logits)
    check(query, key, **with_votes())
    assert routes == ["refused", "separate_exponentials", "query_blocks"]


@pytest.mark.parametrize(
    "bias",
    [
        pytest.param(row_bias(-100.0, 60), id="last rows far below"),
        pytest.param(row_bias(100.0, 60), id="last rows far above"),
        pytest.param(row_bias(-torch.inf, 60), id="last rows masked"),
        pytest.param(row_bias(-100.0, 60).new_tensor([*[0.0] * 40, -100.0]), id="one column below"),
        pytest.param(torch.tensor([*[0.0] * 40, -torch.inf]), id="one column masked"),
    ],
)
def test_a_range_that_turns_out_too_wide_halfway_leaves_nothing_behind(routes, tile_elements, bias):
    tile_elements(TEN_QUERIES)
    query, key, _ = make_qkv(1, 1, M, N, 40)
    check(query, key, **with_votes(bias))
    assert routes == ["refused", "separate_exponentials", "query_blocks"]


@pytest.mark.parametrize("tile", [TEN_KEYS, 1], ids=["10 keys", "1 key"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_known_row_log_sum_exp_needs_one_sweep_over_blocks_of_keys(
    routes, tiles, tile_elements, dtype, tile
):
    query, key, _ = make_qkv(2, 1, M, N, 40, dtype=dtype)
    lse = row_lse(query, key)
    tile_elements(tile)
    check(query, key, normaliser=lse, **with_votes())
    assert routes == ["key_blocks"] * 2
    assert len(tiles) == 2 * (5 if tile == TEN_KEYS else N)


def test_blocks_of_keys_fall_back_to_a_shift_of_their_own(routes, tiles, tile_elements):
    query, key, _ = make_qkv(1, 1, M, N, 40)
    bias = torch.zeros(N)
    bias[7], bias[25] = -100.0, -torch.inf  # columns far below the rows, and a masked one
    lse = row_lse(query, key, attn_mask=bias[None, None, None])
    tile_elements(TEN_KEYS)
    arguments = with_votes(bias)
    check(query, key, normaliser=lse, **arguments)
    assert routes == ["key_blocks"]
    assert len(tiles) == 5 + 2

    _, key_lse = accumulate_maps(query, key, bias=bias, normaliser=lse, impl="streaming")
    expected = attention_statistics(query, key, bias=bias, impl="reference").key_lse
    torch.testing.assert_close(key_lse, expected)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_blocks_of_keys_of_16_bit_inputs(routes, dtype):
    query, key, _ = make_qkv(1, 1, M, N, 40, dtype=dtype)
    check(query, key, normaliser=row_lse(query, key), **with_votes())
    assert routes == ["key_blocks"]


def test_a_normaliser_too_large_for_blocks_of_keys_is_a_shift(routes):
    query, key, _ = make_qkv(1, 1, M, N, 40, logits=40)
    check(query, key, normaliser=row_lse(query, key), **with_votes())
    assert routes == ["shared_exponential", "query_blocks"]


@pytest.mark.parametrize("tile", [ONE_TILE, TEN_QUERIES], ids=["one tile", "blocks"])
@pytest.mark.parametrize(
    ("logits", "bias"),
    [
        pytest.param(90, None, id="sharp"),
        pytest.param(None, row_bias(200.0, 60), id="last rows far above"),
        pytest.param(None, row_bias(-200.0, 60), id="last rows far below"),
        pytest.param(None, torch.full((M, N), -150.0), id="all far below"),
        pytest.param(90, row_bias(-torch.inf, 60), id="sharp, last rows masked"),
    ],
)
def test_a_known_row_log_sum_exp_is_a_shift_that_lets_wide_rows_share(
    routes, tile_elements, tile, logits, bias
):
    tile_elements(tile)
    query, key, _ = make_qkv(1, 2, M, N, 40, logits=logits)
    lse = row_lse(query, key, attn_mask=None if bias is None else bias[None, None])
    assert lse[lse.isfinite()].abs().max() > streaming.SHARED_RANGE
    check(query, key, normaliser=lse, **with_votes(bias))
    assert set(routes) == {"shared_exponential", "query_blocks"}


@pytest.mark.parametrize("logits", [None, 40, 90], ids=["key blocks", "shifted", "sharp"])
def test_the_normaliser_is_taken_as_it_is(logits):
    """No route normalises anew: one that is off by a constant shows in P, and C knows of none."""
    query, key, _ = make_qkv(1, 2, M, N, 40, logits=logits)
    lse = row_lse(query, key)
    arguments = with_votes()
    right = statistics(query, key, normaliser=lse, impl="streaming", **arguments)
    lower = statistics(query, key, normaliser=lse + 2.0, impl="streaming", **arguments)
    for name in ("g2r", "shares"):
        torch.testing.assert_close(getattr(lower, name), getattr(right, name) * math.exp(-2.0))
    torch.testing.assert_close(lower.r2g, right.r2g)
    torch.testing.assert_close(lower.key_lse, right.key_lse)


def test_a_shift_does_not_help_columns_that_nobody_looks_at(routes, tile_elements):
    query, key, _ = make_qkv(1, 1, M, N, 40, logits=200)
    tile_elements(ONE_TILE)
    check(query, key, normaliser=row_lse(query, key), **with_votes())
    assert routes == ["refused", "separate_exponentials", "query_blocks"]


@pytest.mark.parametrize("logits", [None, 200], ids=["shared", "separate"])
@pytest.mark.parametrize("route", ["query_blocks", "key_blocks"])
def test_every_route_runs_without_a_direction(routes, tile_elements, route, logits):
    query, key, _ = make_qkv(1, 2, M, N, 40, logits=logits)
    lse = row_lse(query, key) if route == "key_blocks" else None
    if route == "key_blocks" and logits is not None:
        # rows within the trusted range, columns far below it
        lse, key = row_lse(query[:, :, :, :1], key[:, :, :, :1]), key
        query = torch.cat([query[:, :, :, :1].clamp(-2, 2), torch.zeros_like(query[..., 1:])], -1)
        lse = row_lse(query, key)
    tile_elements(TEN_KEYS)
    both = {name: torch.zeros(1, 2, 1, size) for name, size in (("r2g", M), ("g2r", N))}
    both["shares"] = torch.zeros(1, 2, 1, M)
    values = torch.rand(1, 1, N)
    accumulate_maps(query, key, normaliser=lse, values=values, impl="streaming", **both)
    assert route in routes
    for name, expected in both.items():
        alone = torch.zeros_like(expected)
        accumulate_maps(
            query, key, normaliser=lse, values=values, impl="streaming", **{name: alone}
        )
        # a column more or less may be multiplied in another order
        torch.testing.assert_close(alone, expected, rtol=1e-6, atol=1e-9)


# --- determinism ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [ONE_TILE, 50_000], ids=["one tile", "blocks"])
@pytest.mark.parametrize("logits", [None, 200], ids=["shared", "separate"])
@dtypes
def test_equal_to_the_bit_in_every_run_with_a_number_of_threads(tile_elements, dtype, logits, tile):
    tile_elements(tile)
    query, key, value = make_qkv(2, 3, 311, 233, 40, dtype=dtype, logits=logits)
    threads = torch.get_num_threads()
    # PyTorch's own deterministic mode off: nothing here may need it
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    results = {}
    try:
        # in turn, so that a run comes after others and finds other memory
        for count in (1, 2, 1, 2):
            torch.set_num_threads(count)
            output, statistics = attention_with_statistics(query, key, value, impl="streaming")
            results.setdefault(count, []).append((output, *statistics))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
    for first, *others in results.values():
        for other in others:
            for part, wanted in zip(other, first, strict=True):
                assert torch.equal(part, wanted)


@pytest.mark.parametrize("known_lse", [False, True], ids=["no lse", "known lse"])
@pytest.mark.parametrize("logits", [None, 80, 200], ids=["shared", "shifted", "separate"])
def test_other_batch_items_change_no_bit(routes, known_lse, logits):
    """Each item takes the route that it would take alone."""
    items = [
        make_qkv(1, 2, M, N, 40, seed=seed, logits=size)[:2]
        for seed, size in ((0, None), (1, logits))
    ]

    def statistics(query, key):
        sums = torch.zeros(len(query), 2, 1, M), torch.zeros(len(query), 2, 1, N)
        lse = row_lse(query, key) if known_lse else None
        return *sums, *accumulate_maps(
            query, key, r2g=sums[0], g2r=sums[1], normaliser=lse, impl="streaming"
        )

    alone = [statistics(*item) for item in items]
    routes_alone = [*routes]
    together = statistics(*map(torch.cat, zip(*items, strict=True)))
    assert routes == 2 * routes_alone
    for part, *wanted in zip(together, *alone, strict=True):
        assert torch.equal(part, torch.cat(wanted))


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logits", "known_lse", "route", "tiles_held"),
    [
        pytest.param(None, False, "shared_exponential", 1, id="shared"),
        pytest.param(200, False, "separate_exponentials", 2, id="separate"),
        pytest.param(None, True, "key_blocks", 1, id="key blocks"),
    ],
)
def test_memory_is_a_tile_and_not_the_matrix(routes, logits, known_lse, route, tiles_held):
    query, key, _ = make_qkv(1, 1, 3072, 3072, 40, logits=logits)
    lse = row_lse(query, key) if known_lse else None
    r2g, g2r = torch.zeros(1, 1, 1, 3072), torch.zeros(1, 1, 1, 3072)

    def call(impl):
        accumulate_maps(query, key, r2g=r2g, g2r=g2r, normaliser=lse, impl=impl)

    tile = 4 * streaming.TILE_ELEMENTS
    matrix = 4 * 3072 * 3072
    vectors = 4 * 2**18  # lengths, inputs by head: nothing that grows with the product
    assert peak_bytes(lambda: call("streaming")) <= tiles_held * tile + vectors
    assert route in routes
    # the measure sees what materialising costs
    assert peak_bytes(lambda: call("reference")) >= 2 * matrix > 2 * tile


# --- the attention call ---------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize(
    "bias",
    [
        pytest.param(None, id="no mask"),
        pytest.param(torch.linspace(-3, 3, 131), id="additive"),
        pytest.param(5 * torch.linspace(-3, 3, 131).sin(), id="fp32 that 16 bits would round"),
        pytest.param(torch.arange(131) % 3 > 0, id="bool"),
    ],
)
def test_attention_output_stays_within_the_budget(dtype, bias):
    query, key, value = make_qkv(2, 2, 63, 131, 40, dtype=dtype, logits=20)
    exact, _ = attention_with_statistics(
        query.double(), key.double(), value.double(), bias=bias, impl="reference"
    )
    eager, _ = attention_with_statistics(query, key, value, bias=bias, impl="reference")
    actual, _ = attention_with_statistics(query, key, value, bias=bias, impl="streaming")
    assert actual.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(actual, exact, rtol=1e-11, atol=1e-13)
    else:
        assert_matches_reference(actual, exact=exact, eager=eager, name="output")


@dtypes
@pytest.mark.parametrize("mask", [None, "own dtype", "fp32", "one row", "masked row"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_with_lse_is_pytorchs_attention_to_the_bit(relayout, dtype, mask, scale):
    query, key, value = make_qkv(2, 3, 50, 70, 40, dtype=dtype)
    numbers = torch.randn(2, 1, 50, 70, generator=torch.Generator().manual_seed(1))
    attn_mask = {
        None: None,
        "own dtype": numbers.to(dtype),
        "fp32": numbers,
        "one row": numbers[:, :, :1].to(dtype),
        "masked row": torch.zeros(50, 70, dtype=dtype).index_fill(0, torch.tensor(3), -torch.inf),
    }[mask]
    for layout in ("unet", "contiguous", "sliced", "expanded_batch", "expanded_heads"):
        q, k, v = (relayout(tokens, layout) for tokens in (query, key, value))
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=scale)
        output, lse = native.attention_with_lse(q, k, v, attn_mask=attn_mask, scale=scale)
        assert torch.equal(output, expected)
        assert output.stride() == expected.stride()
        scores = (40**-0.5 if scale is None else scale) * q.double() @ k.double().mT
        if attn_mask is not None:
            scores = scores + attn_mask.double()
        exact = scores.logsumexp(-1)
        seen = ~exact.isneginf()  # PyTorch's own log-sum-exp of a fully masked row is 0
        if (dtype, mask) != (torch.float64, "fp32"):  # where PyTorch 2.13 misreads the mask
            torch.testing.assert_close(lse[seen].double(), exact[seen], rtol=1e-5, atol=1e-5)


def test_attention_with_lse_leaves_other_routes_to_pytorch(monkeypatch, relayout):
    query, key, value = make_qkv(1, 2, 5, 7, 8)
    attend = native.attention_with_lse
    assert attend(query, key, value) is not None
    assert attend(query, key, value, attn_mask=torch.ones(5, 7, dtype=torch.bool)) is None
    assert attend(*(tokens.to("meta") for tokens in (query, key, value))) is None
    # a last axis without stride 1 and a value of another width take PyTorch's plain route
    assert attend(relayout(query, "transposed"), key, value) is None
    assert attend(query, key, value[..., :4]) is None
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    assert attend(query, key, value) is None


def test_attention_without_pytorchs_flash_operator(monkeypatch):
    query, key, value = make_qkv(2, 2, 63, 131, 40)
    expected = attention_with_statistics(query, key, value, impl="streaming")
    monkeypatch.setattr(streaming, "attention_with_lse", lambda *args, **kwargs: None)
    actual = attention_with_statistics(query, key, value, impl="streaming")
    torch.testing.assert_close(actual, expected)
