"""What recording is measured against: the same maps in plain PyTorch, or by other packages.

All of them attend to nothing and return ``(r2g, g2r)``, ``[batch, heads, seqlen_q]`` and ``[...,
seqlen_k]``, with uniform weights. Softmax is fp32; the hooks for a whole UNet keep the means only,
which is kinder than published code, which keeps the matrix.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

CHUNK_ELEMENTS = 1 << 24
"""Scores that the chunked way holds at once: 64 MiB of fp32."""

Maps = tuple[Tensor, Tensor]
Handle = torch.utils.hooks.RemovableHandle


def materialised(query: Tensor, key: Tensor) -> Maps:
    """One matrix of scores, and both its softmaxes in full."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    r2g = scores.softmax(dim=-2, dtype=torch.float32).mean(dim=-1)
    return r2g, scores.softmax(dim=-1, dtype=torch.float32).mean(dim=-2)


def chunked(query: Tensor, key: Tensor) -> Maps:
    """Bounded memory: blocks of rows, once over the queries and once over the keys."""
    return _chunked_columns(key, query), _chunked_columns(query, key)


def flash_colreduce(query: Tensor, key: Tensor) -> Maps:
    """Two calls of the package flash-colreduce, which pads head_dim to a power of 2 by copying."""
    from flash_colreduce import flash_colreduce as columns

    return columns(key, query, "mean"), columns(query, key, "mean")


def flash_colsum(query: Tensor, key: Tensor) -> Maps:
    """Two calls of its predecessor flash-colsum: as many keys as queries, heads averaged."""
    from flash_colsum import flash_colsum as columns

    return columns(key, query), columns(query, key)


def hook_materialised(unet: nn.Module, rows: slice) -> Callable[[], None]:
    """Hook every cross-attention of a UNet: projections once more, then both softmaxes in full.

    Args:
        unet: From diffusers.
        rows: Those of the batch to record.

    Returns:
        A function that takes the hooks away.
    """
    hook = partial(_maps_of_layer, rows=rows)
    return _remover(
        module.register_forward_hook(hook, with_kwargs=True)
        for name, module in unet.named_modules()
        if name.endswith("attn2")
    )


def hook_published(unet: nn.Module, rows: slice) -> Callable[[], None]:
    """The same as published code does it: what leads to query and key is computed once more.

    Group norm, input projection, self-attention, norms and projections, for every block.
    """
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    handles = []
    for module in unet.modules():
        if isinstance(module, Transformer2DModel):
            handles.append(module.register_forward_hook(partial(_enter_again, rows=rows)))
        elif isinstance(module, BasicTransformerBlock):
            hook = partial(_attend_again, rows=rows)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    return _remover(handles)


def _chunked_columns(owner: Tensor, other: Tensor) -> Tensor:
    """Mean over the tokens of ``owner`` of the softmax over those of ``other``."""
    batch, heads, seqlen, head_dim = owner.shape
    sums = other.new_zeros(other.shape[:3], dtype=torch.float32)
    size = max(1, CHUNK_ELEMENTS // (batch * heads * other.shape[2]))
    for rows in owner.split(size, dim=2):
        scores = rows @ other.mT * head_dim**-0.5
        sums += scores.softmax(dim=-1, dtype=torch.float32).sum(dim=-2)
    return sums / seqlen


@torch.no_grad()
def _maps_of_layer(
    attn: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Any, *, rows: slice
) -> None:
    states, context = args[0][rows], kwargs["encoder_hidden_states"][rows]
    query, key = (
        projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for projected in (attn.to_q(states), attn.to_k(context))
    )
    materialised(query, key)


@torch.no_grad()
def _enter_again(module: Any, args: tuple[Tensor, ...], output: Any, *, rows: slice) -> None:
    states = module.norm(args[0][rows])
    if module.use_linear_projection:
        states = states.flatten(2).transpose(1, 2)
    module.proj_in(states)


@torch.no_grad()
def _attend_again(
    block: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Any, *, rows: slice
) -> None:
    states = args[0][rows]
    states = states + block.attn1(block.norm1(states))
    _maps_of_layer(block.attn2, (block.norm2(states),), _rows_of(kwargs, rows), output, rows=_ALL)


def _rows_of(kwargs: dict[str, Any], rows: slice) -> dict[str, Any]:
    return {"encoder_hidden_states": kwargs["encoder_hidden_states"][rows]}


def _remover(handles: Any) -> Callable[[], None]:
    handles = list(handles)

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


_ALL = slice(None)
