"""Attention processors that record beside the model's own attention call.

Three ways in. Layers with diffusers' standard processors get one of ours, which computes the same
operations in the same order. Others of diffusers run their own code in a module where attention is
recorded: see :mod:`i2am.adapters.attention.rebinding`. Both survive ``torch.compile``. Any other
processor object stays in place and is watched: see :mod:`i2am.adapters.attention.watching`. The
image is the same to the bit.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0
from torch import Tensor

from i2am.adapters.attention.attending import Attend, attend_beside, attend_guarded
from i2am.adapters.attention.projections import additive_mask, key_states, split_heads
from i2am.adapters.attention.rebinding import install_rebound
from i2am.adapters.attention.sites import Record, takes, wanted
from i2am.adapters.attention.watching import install_watching
from i2am.adapters.guard import UNGUARDED


class RecordingAttnProcessor(AttnProcessor2_0):
    """``AttnProcessor2_0`` that hands query and key to a recorder; without one it just attends."""

    plain: type = AttnProcessor2_0

    def __init__(
        self,
        record: Record | None = None,
        attend: Attend = attend_beside,
        guard: AbstractContextManager[Any] = UNGUARDED,
    ) -> None:
        super().__init__()
        self.record = record
        self.attend = attend
        self.guard = guard

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        # read once: the recorder may be detached in the middle of a call
        record, attend, guard = self.record, self.attend, self.guard
        if record is not None and not torch.compiler.is_compiling() and not takes(record):
            record = None  # somebody else's call, who shares the model
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mask = additive_mask(attn, keys, attention_mask)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        projections = self.project(attn, hidden_states, encoder_hidden_states)
        query, key, value = split_heads(attn, *projections)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        attended, lse = None, None
        if record is not None:
            attended = attend_guarded(guard, attend, query, key, value, mask)
        if attended is None:
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:
            output, lse = attended
        if record is not None:
            given = wanted(record, value)
            if torch.compiler.is_compiling():  # as in attend_guarded
                record(query, key, bias=mask, query_lse=lse, **given)
            else:
                with guard:
                    record(query, key, bias=mask, query_lse=lse, **given)
        output = output.transpose(1, 2).flatten(2).to(query.dtype)
        output = attn.to_out[1](attn.to_out[0](output))
        if len(shape) == 4:
            output = output.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            output = output + residual
        return output / attn.rescale_output_factor

    def __reduce__(self) -> tuple[Any, ...]:  # copied and pickled as what it replaces
        return self.plain, ()

    def project(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Query, key and value, ``[batch, seqlen, heads * head_dim]``."""
        keys = key_states(attn, hidden_states, encoder_hidden_states)
        return attn.to_q(hidden_states), attn.to_k(keys), attn.to_v(keys)


class FusedRecordingAttnProcessor(RecordingAttnProcessor, FusedAttnProcessor2_0):
    """The same for layers whose projections were fused by ``fuse_qkv_projections``."""

    plain = FusedAttnProcessor2_0

    def project(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Query, key and value, ``[batch, seqlen, heads * head_dim]``."""
        if encoder_hidden_states is None:
            return tuple(attn.to_qkv(hidden_states).chunk(3, dim=-1))
        keys = key_states(attn, hidden_states, encoder_hidden_states)
        return attn.to_q(hidden_states), *attn.to_kv(keys).chunk(2, dim=-1)


def install(
    attn: Any,
    record: Record,
    attend: Attend = attend_beside,
    guard: AbstractContextManager[Any] = UNGUARDED,
) -> Callable[[], None]:
    """Record one attention module.

    Args:
        attn: The module.
        record: What to hand query and key to.
        attend: How it attends meanwhile.
        guard: What recording and attending are inside of.

    Returns:
        A function that puts everything back; a processor that somebody else installed meanwhile is
        left alone.

    Raises:
        NotImplementedError: The layer attends to a part of the sequence or with a part of the heads
            on each of several devices.
    """
    original = attn.processor
    if getattr(original, "_parallel_config", None) is not None:
        raise NotImplementedError(
            "recording a model whose attention is spread over devices (enable_parallelism) is not "
            f"supported, got a {type(original).__name__} with a parallel config"
        )
    replacement = _REPLACEMENTS.get(type(original))
    if replacement is None:
        rebound = install_rebound(attn, record, attend, guard)
        return rebound or install_watching(attn, record, attend, guard)
    ours = replacement(record, attend, guard)
    attn.set_processor(ours)

    def restore() -> None:
        # whoever kept it: from now on it only attends, as the model does
        ours.record, ours.attend, ours.guard = None, attend_beside, UNGUARDED
        if attn.processor is ours:
            attn.set_processor(original)
        elif type(attn.processor) is replacement:
            # (un)loading adapters makes new processors of the classes that it finds
            attn.set_processor(type(original)())

    return restore


_REPLACEMENTS = {
    AttnProcessor2_0: RecordingAttnProcessor,
    FusedAttnProcessor2_0: FusedRecordingAttnProcessor,
    RecordingAttnProcessor: RecordingAttnProcessor,
    FusedRecordingAttnProcessor: FusedRecordingAttnProcessor,
}
