"""The vectors that are summed with: votes ``u`` over the keys, rows ``W`` over the queries.

``samples`` is the number of samples in a batch, or ``None`` while its rows cannot be told apart:
then the vectors of every sample are vectors of every row, and :class:`Own` keeps the right ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Own:
    """Which of the vectors along an axis belong to one sample each.

    Attributes:
        before: How many belong to all and come first.
        count: How many samples have vectors of their own; a divisor of all samples.
        size: How many vectors each of them has.
    """

    before: int
    count: int
    size: int = 1

    def keep(self, sums: Tensor, samples: int, axis: int) -> Tensor:
        """Of the vectors of every sample, keep each sample's own.

        Args:
            sums: ``[samples or 1, ...]``: along `axis` those of all, then `size` of each sample,
                then others of all.
            samples: Number of samples.
            axis: Which axis the vectors are on.
        """
        if self.count < 2:
            return sums
        first = self.before + self.size * of_samples(self.count, samples).to(sums.device)
        own = first[:, None] + torch.arange(self.size, device=sums.device)
        sums = sums.expand(samples, *sums.shape[1:])
        index = own.view(samples, *[1] * (axis - 1), self.size, *[1] * (sums.ndim - axis - 1))
        shape = list(sums.shape)
        shape[axis] = self.size
        chosen = sums.gather(axis, index.expand(shape))
        behind = self.before + self.count * self.size
        rest = sums.narrow(axis, behind, sums.shape[axis] - behind)
        return torch.cat([sums.narrow(axis, 0, self.before), chosen, rest], dim=axis)


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


def places(seqlen_k: int, reference: slice | Tensor, grid: Grid) -> Tensor:
    """``[1, 3, seqlen_k]``: ``y``, ``x`` and ``y^2 + x^2`` of every reference token, the centre of
    its cell in [0, 1]; 0 for other keys."""
    y, x = ((torch.arange(side) + 0.5) / side for side in grid)
    y, x = (each.flatten() for each in torch.meshgrid(y, x, indexing="ij"))
    values = torch.zeros(1, 3, seqlen_k)
    values[..., reference] = torch.stack([y, x, y**2 + x**2])
    return values


def rows(
    grid: Grid,
    regions: Iterable[Region],
    *,
    mask: Tensor | None,
    samples: int | None,
    frames: int = 1,
) -> Tensor:
    """``W`` ``[samples or 1, rows, cells]``: uniform, eq 17 by the inpainting mask, each region.

    Args:
        grid: Where the queries lie.
        regions: Generated-image regions.
        mask: ``[batch, height, width]``.
        samples: See the module.
        frames: How many such grids follow one another; each has the same part.
    """
    cells = grid[0] * grid[1]
    vectors = [torch.full((1, 1, cells), 1 / cells)]
    if mask is not None:
        inside = mask_weights(mask, grid).cpu()[:, None]
        vectors.append(_per_sample(inside / cells, samples))
    vectors += [region_weights(region, grid).cpu()[None, None] for region in regions]
    return _stack(vectors).repeat(1, 1, frames) / frames


def words(weights: Tensor, *, samples: int | None) -> tuple[Tensor, Tensor]:
    """``u`` and ``v`` ``[samples or 1, words, tokens]`` of the words of prompts: the mean over the
    tokens of a word, and 1 on them. A word that a prompt lacks has votes of 0.

    Args:
        weights: ``[prompts, words, tokens]`` in [0, 1]: 1 on the tokens of each word.
        samples: See the module.
    """
    weights = weights.to(torch.get_default_dtype())
    mean = weights / weights.sum(-1, keepdim=True).clamp_min(1)
    if samples is None:
        return mean.flatten(0, 1)[None], weights.flatten(0, 1)[None]
    if len(weights) == 1:
        return mean, weights
    own = of_samples(len(weights), samples)
    return mean[own], weights[own]


def of_samples(owners: int, samples: int) -> Tensor:
    """Sample-major like diffusers: several images per prompt share a mask, one after the other.

    Raises:
        ValueError: They are no divisor of the samples.
    """
    if samples % owners != 0:
        raise ValueError(f"masks must be one per sample or divide them, got {owners} for {samples}")
    return torch.arange(samples) // (samples // owners)


def _per_sample(weights: Tensor, samples: int | None) -> Tensor:
    """``[masks, 1, n]`` to one vector per sample, or to all masks as vectors of every row."""
    if samples is None:
        return weights.transpose(0, 1)
    return weights[of_samples(len(weights), samples)]


def _stack(weights: list[Tensor]) -> Tensor:
    batch = max(len(weight) for weight in weights)
    return torch.cat([weight.expand(batch, -1, -1) for weight in weights], dim=1)
