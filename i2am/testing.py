"""Helpers shared by tests and benchmarks: inputs like a model's, and the ruler."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from i2am.attribution import Accumulator, AttentionSite, AttributionMaps, Grid
from i2am.attribution.buffers import Words
from i2am.attribution.storage import tags_by_path
from i2am.kernels import AttentionStatistics, Over, Probe, accumulate, attention
from i2am.memory import peak_bytes as peak_bytes


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


def accumulate_maps(
    query: Tensor,
    key: Tensor,
    *,
    r2g: Tensor | None = None,
    g2r: Tensor | None = None,
    query_weights: Tensor | None = None,
    key_weights: Tensor | None = None,
    shares: Tensor | None = None,
    values: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Adds ``C U`` to ``r2g``, ``W P`` to ``g2r`` and ``P V^T`` to ``shares``, each where given;
    weights are uniform where not. The rest is as in :func:`i2am.kernels.accumulate`."""

    def uniform(tokens: Tensor) -> Tensor:
        size = tokens.shape[2]
        return torch.ones(1, 1, size, dtype=torch.float64, device=tokens.device) / size

    probes = []
    if g2r is not None:
        rows = uniform(query) if query_weights is None else query_weights
        probes.append(Probe(Over.KEYS, g2r, left=rows))
    if r2g is not None:
        votes = uniform(key) if key_weights is None else key_weights
        votes = votes.unsqueeze(-2) if votes.ndim in (1, 2) else votes
        probes.append(Probe(Over.QUERIES, r2g, right=votes[None] if votes.ndim == 2 else votes))
    if shares is not None:
        probes.append(Probe(Over.KEYS, shares, right=values))
    return accumulate(query, key, probes, **options)


def attention_with_statistics(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_weights: Tensor | None = None,
    key_weights: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, AttentionStatistics]:
    """The attention output, and the statistics of the call by the log-sum-exp that it left."""
    output, lse = attention(query, key, value, **options)
    batch, heads, seqlen_q, _ = query.shape
    rows = 1 if query_weights is None else query_weights.shape[1]
    several = key_weights is not None and key_weights.ndim == 3
    votes = key_weights.shape[1] if key_weights is not None and several else 1
    r2g = lse.new_zeros((batch, heads, votes, seqlen_q))
    g2r = lse.new_zeros((batch, heads, rows, key.shape[2]))
    weights = {"query_weights": query_weights, "key_weights": key_weights}
    found = accumulate_maps(query, key, r2g=r2g, g2r=g2r, normaliser=lse, **weights, **options)
    return output, AttentionStatistics(r2g if several else r2g[:, :, 0], g2r, *found)


def hardware_rounding(query: Tensor, key: Tensor, *, scale: float | None = None) -> float:
    """The relative error of statistics that a GPU's arithmetic adds to eager fp32's, else 0.

    In 16 bits matrix instructions truncate where they align the products of a score (``HGMMA`` on
    Hopper), where eager fp32 rounds: a score is off by a few ``eps * max |S|``. In fp32 the
    products are added in another order than the library's, which is worth one of them. Everything
    made of its exponential is off by as much. With ordinary logits that is no more than the error
    of eager fp32; with logits of hundreds it is several times as much.
    """
    if query.device.type != "cuda" or query.dtype == torch.float64:
        return 0.0
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    largest = (scale * (query.double() @ key.double().mT)).abs().max().item()
    units = 1 if query.dtype == torch.float32 else 4
    return units * torch.finfo(torch.float32).eps * largest


def assert_matches_reference(
    actual: Tensor,
    *,
    exact: Tensor,
    eager: Tensor,
    name: str,
    factor: float = 2.0,
    rounding: float = 0.0,
) -> None:
    """Fail unless ``actual`` is at most ``factor`` times as far from ``exact`` as ``eager`` is.

    ``exact`` is the fp64 reference on the same values, ``eager`` the reference in the working
    dtype. Errors are the largest absolute ones relative to the largest exact value; one rounding
    band of fp32 (4 eps) is granted where the eager error happens to vanish, and ``rounding`` for
    what the hardware adds (:func:`hardware_rounding`). Infinities must agree.
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
    budget = budget + 4 * torch.finfo(torch.float32).eps + rounding
    error = (actual.double() - exact)[finite].abs().max() / size
    # written so that a NaN fails
    assert error <= budget, f"{name}: error {error:.3e} exceeds the budget {budget:.3e}"


def make_site(
    layer: str,
    generated_grid: Grid,
    reference_grid: Grid | None,
    *,
    heads: int = 2,
    tokens: int = 1,
    **said: Any,
) -> AttentionSite:
    """A cross-attention layer; without a reference grid it has as many reference tokens as told.
    `said` is the rest of :class:`AttentionSite`: source, role, frames, measure, tags."""
    if reference_grid is not None:
        tokens = reference_grid[0] * reference_grid[1]
    given = {
        "informative": tokens > 1 or said.get("role") == "text",
        "tags": tags_by_path(layer),
        **said,
    }
    return AttentionSite(layer, heads, generated_grid, reference_grid, tokens, **given)


def make_maps(
    sites: Sequence[AttentionSite],
    *,
    samples: int = 2,
    steps: int = 3,
    time_groups: int = 2,
    seed: int = 0,
    provenance: dict[str, Any] | None = None,
    **recording: Any,
) -> AttributionMaps:
    """Maps of a run of random queries and keys; `recording` goes to :class:`Accumulator`.

    Sites of one layer are its sources, which follow one another in its keys.
    """
    accumulator = Accumulator(time_groups=time_groups, **recording)
    layers: dict[str, list[AttentionSite]] = {}
    for site in sites:
        layers.setdefault(site.layer, []).append(site)
    for step in range(steps):
        for number, of in enumerate(layers.values()):
            query, key, _ = make_qkv(
                samples,
                of[0].heads,
                of[0].cells,
                sum(site.reference_tokens for site in of),
                8,
                seed=(seed * len(layers) + number) * steps + step,
            )
            lse, end = None, 0
            for site in of:
                start, end = end, end + site.reference_tokens
                said = Words((site.source,), torch.ones(1, 1, end - start))
                lse = accumulator.add(
                    site,
                    query,
                    key,
                    group=step * time_groups // steps,
                    reference=slice(None) if len(of) == 1 else slice(start, end),
                    words=said if site.role == "text" else None,
                    query_lse=lse,
                )
    return AttributionMaps(
        accumulator.layers(),
        votes=accumulator.votes,
        rows=accumulator.rows,
        provenance=provenance or {},
        pairs=accumulator.pairs(),
    )
