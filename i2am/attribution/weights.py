"""The vectors that are summed with: votes ``u`` over the keys, rows ``W`` over the queries.

``samples`` is the number of samples in a batch, or ``None`` while its rows cannot be told apart:
then every mask of the batch is a vector of every row, and :func:`own_mask` keeps the right ones.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from i2am.attribution.grid import Grid, Region, mask_weights, region_weights


def as_batch(name: str, mask: Tensor | None) -> Tensor | None:
    """A mask as ``[batch, height, width]``.

    Raises:
        ValueError: It has another number of axes, or one of its masks is 0 everywhere.
    """
    if mask is None:
        return None
    if mask.ndim not in (2, 3):
        raise ValueError(
            f"{name} must be [height, width] or [batch, height, width], got {list(mask.shape)}"
        )
    mask = mask if mask.ndim == 3 else mask[None]
    if bool((mask.flatten(1).amax(1) <= 0).any()):
        raise ValueError(f"{name} must cover something, got one that is 0 everywhere")
    return mask


def votes(
    seqlen_k: int,
    reference: slice | Tensor,
    voters: slice | Tensor | None,
    *,
    grid: Grid | None,
    mask: Tensor | None,
    samples: int | None,
) -> Tensor:
    """``u`` ``[samples or 1, votes, seqlen_k]``: uniform, then one by the reference mask if any.

    Args:
        seqlen_k: Keys of the call.
        reference: Which of them are the reference tokens.
        voters: Which share the uniform vote; default the reference tokens.
        grid: Where the reference tokens lie; without one the masked vote is a placeholder, so that
            the votes axis is the same on every layer.
        mask: ``[batch, height, width]``.
        samples: See the module.
    """
    uniform = torch.zeros(1, 1, seqlen_k)
    uniform[..., reference if voters is None else voters] = 1
    vectors = [uniform / uniform.sum()]
    if mask is not None:
        if grid is None:
            inside = torch.ones(len(mask), len(torch.arange(seqlen_k)[reference]))
        else:
            inside = mask_weights(mask, grid).cpu()
        masked = torch.zeros(len(inside), 1, seqlen_k)
        masked[..., reference] = (inside / inside.sum(-1, keepdim=True))[:, None]
        vectors.append(_per_sample(masked, samples))
    return _stack(vectors)


def groups(
    seqlen_k: int,
    reference: slice | Tensor,
    *,
    grid: Grid | None,
    mask: Tensor | None,
    samples: int | None,
) -> Tensor:
    """``v`` ``[samples or 1, votes, seqlen_k]`` in [0, 1]: 1 on the reference tokens; then how much
    of each lies in the reference mask, if any. Arguments as for :func:`votes`.
    """
    every = torch.zeros(1, 1, seqlen_k)
    every[..., reference] = 1
    vectors = [every]
    if mask is not None:
        inside = every.repeat(len(mask), 1, 1)
        if grid is not None:
            inside[..., reference] = mask_weights(mask, grid).cpu()[:, None]
        vectors.append(_per_sample(inside, samples))
    return _stack(vectors)


def rows(
    grid: Grid, regions: Iterable[Region], *, mask: Tensor | None, samples: int | None
) -> Tensor:
    """``W`` ``[samples or 1, rows, cells]``: uniform, eq 17 by the inpainting mask, each region.

    Args:
        grid: Where the queries lie.
        regions: Generated-image regions.
        mask: ``[batch, height, width]``.
        samples: See the module.
    """
    cells = grid[0] * grid[1]
    vectors = [torch.full((1, 1, cells), 1 / cells)]
    if mask is not None:
        inside = mask_weights(mask, grid).cpu()[:, None]
        vectors.append(_per_sample(inside / cells, samples))
    vectors += [region_weights(region, grid).cpu()[None, None] for region in regions]
    return _stack(vectors)


def own_mask(sums: Tensor, mask: Tensor | None, samples: int, axis: int) -> Tensor:
    """Keep, of the vectors for every mask of the batch (after the uniform one), each sample's own.

    Args:
        sums: ``[samples or 1, ...]`` with vectors along ``axis``.
        mask: ``[batch, height, width]`` or None.
        samples: Number of samples.
        axis: Which axis the vectors are on.
    """
    masks = 0 if mask is None else len(mask)
    if masks < 2:
        return sums
    own = 1 + _mask_of_sample(masks, samples).to(sums.device)
    rest = sums.narrow(axis, 1 + masks, sums.shape[axis] - 1 - masks)
    sums = sums.expand(samples, *sums.shape[1:])
    index = own.view(-1, *[1] * (sums.ndim - 1))
    shape = list(sums.shape)
    shape[axis] = 1
    chosen = sums.gather(axis, index.expand(shape))
    rest = rest.expand(samples, *rest.shape[1:])
    return torch.cat([sums.narrow(axis, 0, 1), chosen, rest], dim=axis)


def _per_sample(weights: Tensor, samples: int | None) -> Tensor:
    """``[masks, 1, n]`` to one vector per sample, or to all masks as vectors of every row."""
    if samples is None:
        return weights.transpose(0, 1)
    return weights[_mask_of_sample(len(weights), samples)]


def _mask_of_sample(masks: int, samples: int) -> Tensor:
    """Sample-major like diffusers: several images per prompt share a mask, one after the other."""
    if samples % masks != 0:
        raise ValueError(f"masks must be one per sample or divide them, got {masks} for {samples}")
    return torch.arange(samples) // (samples // masks)


def _stack(weights: list[Tensor]) -> Tensor:
    batch = max(len(weight) for weight in weights)
    return torch.cat([weight.expand(batch, -1, -1) for weight in weights], dim=1)
