"""Pooling: cells that are weighted means of tokens, as a sparse matrix in compressed rows."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pooling:
    """A sparse ``[cells, tokens]`` matrix whose cells come in bands.

    The cells of a band have their tokens in one range. In raster order a band is a row of cells,
    and its tokens are the rows of the token grid under it.

    Attributes:
        tokens: int64 ``[entries]``: the token of each entry, cell after cell.
        starts: int64 ``[cells]``: the first entry of each cell; none is empty.
        weights: fp32 ``[entries]``.
        bands: Cells, tokens and entries of each band; the cells of all bands follow each other.
        size: Tokens that are pooled.
    """

    tokens: Tensor
    starts: Tensor
    weights: Tensor
    bands: tuple[tuple[slice, slice, slice], ...]
    size: int

    @classmethod
    def of(cls, bands: Iterable[tuple[int, Tensor]], size: int) -> "Pooling":
        """A pooling of ``size`` tokens.

        Args:
            bands: For each band its first token and its weights ``[cells, tokens]``.
            size: Number of tokens.

        Raises:
            ValueError: A cell has no weight other than 0, or a band reaches beyond the tokens.
        """
        tokens, starts, weights, ranges = [], [], [], []
        cells = entries = 0
        for first, band in bands:
            in_cell, place = band.nonzero(as_tuple=True)
            counts = torch.bincount(in_cell, minlength=len(band))
            if not len(band) or not bool((counts > 0).all()):
                raise ValueError("every cell must have a weight other than 0, got one without")
            if first < 0 or first + band.shape[1] > size:
                raise ValueError(
                    f"a band must lie within {size} tokens, got {first} to {first + band.shape[1]}"
                )
            tokens.append(place + first)
            starts.append(entries + counts.cumsum(0) - counts)
            weights.append(band[in_cell, place].float())
            ranges.append(
                (
                    slice(cells, cells + len(band)),
                    slice(first, first + band.shape[1]),
                    slice(entries, entries + len(place)),
                )
            )
            cells += len(band)
            entries += len(place)
        return cls(torch.cat(tokens), torch.cat(starts), torch.cat(weights), tuple(ranges), size)

    @property
    def cells(self) -> int:
        """Number of cells."""
        return len(self.starts)

    def parts(self) -> Iterator[tuple[slice, slice, "Pooling"]]:
        """For each band its cells, its tokens, and how these make those."""
        for cells, tokens, entries in self.bands:
            places = self.tokens[entries] - tokens.start
            starts = self.starts[cells] - entries.start
            size = tokens.stop - tokens.start
            whole = (slice(0, len(starts)), slice(0, size), slice(0, len(places)))
            yield cells, tokens, Pooling(places, starts, self.weights[entries], (whole,), size)

    def to(self, device: torch.device) -> "Pooling":
        """The same on another device."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            starts=self.starts.to(device),
            weights=self.weights.to(device),
        )

    def tensors(self) -> list[Tensor]:
        """All that there is to it; the last one, of whole numbers, stays on the CPU."""
        ends = [end for band in self.bands for part in band for end in (part.start, part.stop)]
        return [self.tokens, self.starts, self.weights, torch.tensor([self.size, *ends])]

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor]) -> "Pooling":
        """The inverse of :meth:`tensors`."""
        tokens, starts, weights, numbers = tensors
        size, *ends = numbers.tolist()
        parts = [slice(*pair) for pair in zip(ends[::2], ends[1::2], strict=True)]
        bands = tuple(zip(parts[::3], parts[1::3], parts[2::3], strict=True))
        return cls(tokens, starts, weights, bands, size)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """``[cells, tokens]``"""
        entries = len(self.tokens)
        counts = self.starts.diff(append=self.starts.new_full((1,), entries))
        cells = torch.arange(self.cells, device=self.tokens.device)
        # their number is told, so that no GPU is asked for it
        cells = cells.repeat_interleave(counts, output_size=entries)
        matrix = self.weights.new_zeros((self.cells, self.size), dtype=dtype)
        matrix[cells, self.tokens] = self.weights.to(dtype)
        return matrix
