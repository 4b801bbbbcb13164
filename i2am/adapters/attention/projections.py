"""From what a diffusers attention module is given to heads of queries and keys."""

from typing import Any

from torch import Tensor


def key_states(attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> Tensor:
    """What keys are projected from: the context, or the queries' own states."""
    if encoder_hidden_states is None:
        return hidden_states
    if attn.norm_cross:
        normalised: Tensor = attn.norm_encoder_hidden_states(encoder_hidden_states)
        return normalised
    return encoder_hidden_states


def additive_mask(attn: Any, keys: Tensor, mask: Tensor | None) -> Tensor | None:
    """A mask as attention adds it, ``[batch, heads, 1 or seqlen_q, seqlen_k]``."""
    if mask is None:
        return None
    mask = attn.prepare_attention_mask(mask, keys.shape[1], len(keys))
    return mask.view(len(keys), attn.heads, -1, mask.shape[-1])


def split_heads(attn: Any, *projections: Tensor) -> list[Tensor]:
    """``[batch, seqlen, heads * head_dim]`` to ``[batch, heads, seqlen, head_dim]``."""
    return [states.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for states in projections]
