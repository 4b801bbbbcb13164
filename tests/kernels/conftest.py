"""What the tests of the kernels share: memory that bites, and the strides of real callers."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="module")
def poisoned_memory() -> Iterator[None]:
    """Fills whatever `torch.empty` and its relatives allocate with NaN; by request, per module."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session")
def relayout() -> Callable[[Tensor, str], Tensor]:
    """The same ``[batch, heads, seqlen, head_dim]`` tokens with other strides; see the names."""

    def with_layout(tokens: Tensor, layout: str) -> Tensor:
        if layout == "unet":
            return tokens.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "contiguous":
            return tokens.contiguous()
        if layout == "transposed":
            return tokens.mT.contiguous().mT
        if layout == "sliced":
            # everything between the tokens is NaN: reading past an edge shows
            batch, heads, seqlen, head_dim = tokens.shape
            wide = tokens.new_full((batch + 1, heads, 2 * seqlen, head_dim + 3), torch.nan)
            view = wide[1:, :, ::2, 2:-1]
            return view.copy_(tokens)
        if layout == "shifted":
            # strides of whole 16 bytes from an address that is none
            wide = tokens.new_full((*tokens.shape[:3], tokens.shape[3] + 8), torch.nan)
            return wide[..., 4:-4].copy_(tokens)
        # stride 0 along one axis: other values, as all of that axis are the first
        axis = ("expanded_batch", "expanded_heads", "expanded_tokens").index(layout)
        return tokens.narrow(axis, 0, 1).expand_as(tokens)

    return with_layout
