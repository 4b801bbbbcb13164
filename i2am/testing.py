"""Helpers shared by tests and benchmarks: inputs like a model's, and the ruler."""

import torch
from torch import Tensor


def make_qkv(
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    logits: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value ``[batch, heads, seqlen, head_dim]`` with the strides of a UNet layer.

    They are views of ``[batch, seqlen, heads, head_dim]`` projections, so never contiguous for more
    than one head. ``logits`` scales query so that the largest ``|scale * q . k|`` has about that
    size; ``None`` leaves standard normal entries.
    """
    generator = torch.Generator().manual_seed(seed)

    def projection(seqlen: int) -> Tensor:
        tokens = torch.randn(batch, seqlen, heads, head_dim, generator=generator)
        return tokens.to(device=device, dtype=dtype).transpose(1, 2)

    query, key, value = projection(seqlen_q), projection(seqlen_k), projection(seqlen_k)
    if logits is not None:
        scores = (query.double() @ key.double().mT) * head_dim**-0.5
        query = (query * (logits / scores.abs().max().item())).to(dtype)
    return query, key, value


def assert_matches_reference(
    actual: Tensor, *, exact: Tensor, eager: Tensor, name: str, factor: float = 2.0
) -> None:
    """Fail unless ``actual`` is at most ``factor`` times as far from ``exact`` as ``eager`` is.

    ``exact`` is the fp64 reference on the same values, ``eager`` the reference in the working
    dtype. Errors are the largest absolute ones relative to the largest exact value; one rounding
    band of fp32 (4 eps) is granted where the eager error happens to vanish. Infinities must agree.
    """
    assert actual.shape == exact.shape, (
        f"{name}: shape {tuple(actual.shape)} != {tuple(exact.shape)}"
    )
    exact = exact.double()
    infinite = exact.isinf()
    assert torch.equal(actual.double()[infinite], exact[infinite]), f"{name}: infinities differ"
    finite = ~infinite
    if not finite.any():
        return
    size = exact[finite].abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    budget = factor * (eager.double() - exact)[finite].abs().max() / size
    budget = budget + 4 * torch.finfo(torch.float32).eps
    error = (actual.double() - exact)[finite].abs().max() / size
    # written so that a NaN fails
    assert error <= budget, f"{name}: error {error:.3e} exceeds the budget {budget:.3e}"
