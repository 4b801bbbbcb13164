"""PyTorch's attention with its log-sum-exp: on a GPU as it is, elsewhere the dispatch by fakes.

The operators of the CPU are held against the ruler in test_streaming.py.
"""

import re

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from i2am.kernels import native
from i2am.kernels.native import attention_with_lse
from i2am.testing import make_qkv

FLASH, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
EFFICIENT, MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
B, H, M, N, D = 2, 3, 50, 70, 40


# --- dispatch, on fake tensors of a GPU: PyTorch's own shapes, no numbers -------------------------


class Watch(TorchDispatchMode):
    """The attention operators that run, as ``(name, mask)``."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        found = re.fullmatch(r"aten::_scaled_dot_product_(\w+)_attention", operator.name())
        if found:
            self.seen.append((found[1], next(filter(torch.is_tensor, args[3:]), None)))
        return operator(*args, **kwargs or {})


@pytest.fixture
def operators():
    """The attention operators that ran on the fake GPU."""
    return []


@pytest.fixture
def on_a_gpu(monkeypatch, operators):
    """``call(backend, ...)`` attends on a fake GPU where PyTorch chooses that backend."""

    def call(backend, *, head_dim=D, mask=None, dtype=torch.float16):
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: backend.value)
        with FakeTensorMode(), Watch(operators):
            shape = {"dtype": dtype, "device": "cuda"}
            query = torch.empty(B, M, H, head_dim, **shape).transpose(1, 2)
            key = torch.empty(B, N, H, head_dim, **shape).transpose(1, 2)
            attn_mask = None if mask is None else torch.empty(mask, **shape)
            return attention_with_lse(query, key, key, attn_mask=attn_mask)

    return call


@pytest.mark.parametrize(
    ("backend", "name"), [(FLASH, "flash"), (CUDNN, "cudnn"), (EFFICIENT, "efficient")]
)
def test_the_operator_that_pytorch_chooses_hands_its_log_sum_exp_over(
    on_a_gpu, operators, backend, name
):
    output, lse = on_a_gpu(backend)
    assert operators == [(name, None)]
    assert (output.shape, output.dtype) == ((B, H, M, D), torch.float16)
    assert (lse.shape, lse.dtype) == ((B, H, M), torch.float32)


@pytest.mark.parametrize("mask", [(B, H, M, N), (B, 1, 1, N), (M, N), (M, 1)], ids=str)
def test_an_additive_mask_goes_along(on_a_gpu, operators, mask):
    for backend in (CUDNN, EFFICIENT):
        assert on_a_gpu(backend, mask=mask)[1].shape == (B, H, M)
    (_, as_it_is), (_, aligned) = operators
    assert as_it_is.shape == mask
    # what the memory-efficient kernel wants: every row starts at a multiple of 16
    assert aligned.shape == (B, H, M, N)
    assert aligned.stride(3) == 1
    assert all(step % 16 == 0 for step in aligned.stride()[:3])


def test_what_pytorch_does_another_way_is_left_to_it(on_a_gpu, operators, monkeypatch):
    assert on_a_gpu(MATH) is None
    # PyTorch pads these before the operator
    assert on_a_gpu(FLASH, head_dim=36) is None
    # its operator takes no mask
    assert on_a_gpu(FLASH, mask=(M, N)) is None
    monkeypatch.delitem(native.ADMITTED, ("cuda", CUDNN.value))
    assert on_a_gpu(CUDNN) is None
    assert operators == []


@pytest.mark.parametrize(
    "returned",
    [
        lambda query: (query, query.new_empty((B, H, M - 1), dtype=torch.float32)),
        lambda query: (query, query.new_empty((B, H, M))),
        lambda query: (query, query.new_empty(0, dtype=torch.float32)),
        lambda query: (query, None),
        lambda query: (query,),
        lambda query: 1 / 0,
    ],
    ids=["too short", "half precision", "empty", "none", "missing", "an error"],
)
def test_what_is_no_log_sum_exp_is_left_to_pytorch(on_a_gpu, monkeypatch, returned):
    attend = {("cuda", CUDNN.value): lambda query, *_: returned(query)}
    monkeypatch.setattr(native, "ADMITTED", attend)
    assert on_a_gpu(CUDNN) is None


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_see_nothing_have_no_odd_log_sum_exp(monkeypatch, odd):
    query, key, value = make_qkv(1, 1, 5, 7, 8)
    found = torch.tensor([[[1.0, odd, 2.0, -3.0, odd]]])
    attend = {("cpu", FLASH.value): lambda *_: (query, found)}
    monkeypatch.setattr(native, "ADMITTED", attend)
    lse = attention_with_lse(query, key, value, attn_mask=torch.zeros(5, 7))[1]
    assert lse.tolist() == [[[1.0, -torch.inf, 2.0, -3.0, -torch.inf]]]
    # without a mask every row sees something, and nothing is touched
    assert torch.equal(attention_with_lse(query, key, value)[1].isfinite(), found.isfinite())


# --- on a GPU -------------------------------------------------------------------------------------

SHAPES = [
    (3072, 1037, 40),
    (768, 1037, 80),
    (192, 1037, 160),
    (50, 77, 40),
    (1024, 1024, 64),
    (4096, 1, 40),
    (3072, 3072, 72),
    (1024, 2048, 128),
]


def held_against_pytorch(query, key, value, mask=None, scale=None):
    """The same image to the bit, and a log-sum-exp as exact as its dtype allows."""
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    found = attention_with_lse(query, key, value, attn_mask=mask, scale=scale)
    assert found is not None, "PyTorch took a route that hands over no log-sum-exp"
    output, lse = found
    assert torch.equal(output, expected)
    assert output.stride() == expected.stride()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * query.double() @ key.double().mT
    if mask is not None:
        scores = scores + mask.double()
    exact = scores.logsumexp(-1)
    seen = ~exact.isneginf()
    size = torch.cat([scores[scores.isfinite()], exact[seen]]).abs().max().item()
    # tensor cores truncate where they align products of 16 bits
    tolerance = 8 * torch.finfo(torch.float32).eps * size
    if query.dtype == torch.float32:
        tolerance *= 4  # three TF32 products
    torch.testing.assert_close(lse[seen].double(), exact[seen], rtol=0, atol=tolerance)
    assert not lse.isnan().any()


def admitted(query, key, value, mask, backend):
    """Whether the backend takes the call at all, on this card."""
    try:
        with sdpa_kernel(backend):
            choice = torch._fused_sdp_choice(query, key, value, mask, 0.0, False)
    except RuntimeError:
        return False
    return choice == backend.value


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_pytorch_chooses_gives_the_same_image(shape, masked, dtype):
    queries, keys, head_dim = shape
    query, key, value = make_qkv(2, 8, queries, keys, head_dim, dtype=dtype, device="cuda")
    mask = None
    if masked:
        mask = torch.randn(2, 1, 1, keys, generator=torch.Generator().manual_seed(1))
        mask = mask.to("cuda", dtype)
        mask[..., 1::3] = -torch.inf
    held_against_pytorch(query, key, value, mask)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [FLASH, CUDNN, EFFICIENT], ids=lambda backend: backend.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_admitted_backend_gives_the_same_image(shape, dtype, backend):
    if ("cuda", backend.value) not in native.ADMITTED:
        pytest.skip(f"{backend.name} is not admitted")
    queries, keys, head_dim = shape
    for logits in (None, 200):
        inputs = make_qkv(2, 8, queries, keys, head_dim, dtype=dtype, device="cuda", logits=logits)
        if not admitted(*inputs, None, backend):
            pytest.skip(f"{backend.name} does not take {shape} on this card")
        with sdpa_kernel(backend):
            held_against_pytorch(*inputs, scale=None if logits else 0.2)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [CUDNN, EFFICIENT], ids=lambda backend: backend.name)
def test_a_row_that_sees_nothing_is_no_number(backend):
    query, key, value = make_qkv(2, 4, 128, 77, 64, dtype=torch.float16, device="cuda")
    mask = torch.zeros(128, 77, dtype=torch.float16, device="cuda")
    mask[3] = -torch.inf
    if not admitted(query, key, value, mask, backend):
        pytest.skip(f"{backend.name} takes no mask on this card")
    with sdpa_kernel(backend):
        found = attention_with_lse(query, key, value, attn_mask=mask)
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert found is not None
    # the image is PyTorch's own, NaN or not
    assert torch.equal(found[0].nan_to_num(7.0), expected.nan_to_num(7.0))
    lse = found[1]
    assert not lse.isnan().any()
    assert not lse.isposinf().any()
