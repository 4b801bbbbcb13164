"""Attention processors that record beside the model's own attention call.

Two ways in. Layers with diffusers' standard processors get one of ours, which computes the same
operations in the same order and survives ``torch.compile``. Any other processor object (IP-Adapter,
PAG, third-party ones) stays in place, with its weights and its class name, as an instance of a
subclass that watches its ``scaled_dot_product_attention`` calls. The image is the same to the bit.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0
from torch import Tensor
from torch.overrides import TorchFunctionMode

from i2am.kernels.streaming import attention_with_lse

Record = Callable[..., None]
"""``record(call_index, query, key, bias, scale, query_lse)``, all but the tensors optional."""


class RecordingAttnProcessor(AttnProcessor2_0):
    """``AttnProcessor2_0`` that hands query and key to a recorder; without one it just attends."""

    def __init__(self, record: Record | None = None) -> None:
        super().__init__()
        self.record = record

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
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attention_mask is not None:
            keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            attention_mask = attn.prepare_attention_mask(
                attention_mask, keys.shape[1], keys.shape[0]
            )
            attention_mask = attention_mask.view(
                keys.shape[0], attn.heads, -1, attention_mask.shape[-1]
            )
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        query, key, value = self.project(attn, hidden_states, encoder_hidden_states)
        output, lse = _attend(query, key, value, attention_mask)
        if self.record is not None:
            self.record(query, key, bias=attention_mask, query_lse=lse)
        output = output.transpose(1, 2).flatten(2).to(query.dtype)
        output = attn.to_out[1](attn.to_out[0](output))
        if len(shape) == 4:
            output = output.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            output = output + residual
        return output / attn.rescale_output_factor

    def project(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, ``[batch, heads, seqlen, head_dim]``."""
        keys = _key_states(attn, hidden_states, encoder_hidden_states)
        return _heads(attn, attn.to_q(hidden_states), attn.to_k(keys), attn.to_v(keys))


class FusedRecordingAttnProcessor(RecordingAttnProcessor, FusedAttnProcessor2_0):
    """The same for layers whose projections were fused by ``fuse_qkv_projections``."""

    def project(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, ``[batch, heads, seqlen, head_dim]``."""
        if encoder_hidden_states is None:
            return _heads(attn, *attn.to_qkv(hidden_states).chunk(3, dim=-1))
        keys = _key_states(attn, hidden_states, encoder_hidden_states)
        return _heads(attn, attn.to_q(hidden_states), *attn.to_kv(keys).chunk(2, dim=-1))


def install(attn: Any, record: Record) -> Callable[[], bool]:
    """Record one attention module.

    Returns:
        A function that puts everything back and tells whether the module still recorded until then;
        a processor that somebody else installed meanwhile is left alone.
    """
    original = attn.processor
    replacement = _REPLACEMENTS.get(type(original))
    if replacement is None:
        return _install_watching(attn, original, record)
    ours = replacement(record)
    attn.set_processor(ours)

    def restore() -> bool:
        if attn.processor is not ours:
            return False
        attn.set_processor(original)
        return True

    return restore


_REPLACEMENTS = {
    AttnProcessor2_0: RecordingAttnProcessor,
    FusedAttnProcessor2_0: FusedRecordingAttnProcessor,
}

_WATCHED = "_i2am_records"


def _install_watching(attn: Any, processor: Any, record: Record) -> Callable[[], bool]:
    # one processor object may serve many modules: the recorders are kept by module
    if _WATCHED not in vars(processor):
        processor.__class__ = _watching_class(type(processor))
        vars(processor)[_WATCHED] = {}
    vars(processor)[_WATCHED][attn] = record

    def restore() -> bool:
        records = vars(processor)[_WATCHED]
        del records[attn]
        if not records:
            del vars(processor)[_WATCHED]
            processor.__class__ = type(processor).__mro__[1]
        return attn.processor is processor

    return restore


@functools.cache  # a class is asked for once per recorded processor class
def _watching_class(base: Any) -> Any:
    """A subclass of a processor's class with the same signature, constructor and ``isinstance``."""

    @torch.compiler.disable  # a function mode inside a compiled graph would see nothing
    def watch(self: Any, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        record = vars(self).get(_WATCHED, {}).get(attn)
        if record is None:
            return base.__call__(self, attn, hidden_states, *args, **kwargs)
        with _WatchAttention(record) as watching:
            output = base.__call__(self, attn, hidden_states, *args, **kwargs)
        if watching.calls == 0:
            # sliced, xformers and the like compute attention otherwise: project once more
            _record_projections(record, attn, hidden_states, *args, **kwargs)
        return output

    def __call__(self: Any, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return watch(self, attn, hidden_states, *args, **kwargs)

    # modules pass on only the keywords that the signature names
    __call__.__signature__ = inspect.signature(base.__call__)  # type: ignore[attr-defined]
    return type(f"Recording{base.__name__}", (base,), {"__call__": __call__})


class _WatchAttention(TorchFunctionMode):
    """Records every ``scaled_dot_product_attention`` call after it has been made, unchanged."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            given = dict(zip(_SDPA_ARGUMENTS, args, strict=False)) | kwargs
            if given.get("is_causal"):
                raise NotImplementedError("recording causal attention is not supported")
            query, key = given["query"], given["key"]
            if key.shape[1] != query.shape[1]:
                key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            self.record(
                query,
                key,
                bias=given.get("attn_mask"),
                scale=given.get("scale"),
                call_index=self.calls,
            )
            self.calls += 1
        return output


_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def _record_projections(
    record: Record,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    if hidden_states.ndim == 4:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
    keys = _key_states(attn, hidden_states, encoder_hidden_states)
    projected_keys = attn.to_k(keys)
    query, key, _ = _heads(attn, attn.to_q(hidden_states), projected_keys, projected_keys)
    if attention_mask is not None:
        attention_mask = attn.prepare_attention_mask(attention_mask, keys.shape[1], len(keys))
        attention_mask = attention_mask.view(len(keys), attn.heads, -1, attention_mask.shape[-1])
    record(query, key, bias=attention_mask, scale=attn.scale)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention, to the bit; with its log-sum-exp where PyTorch yields it."""
    if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
        with_lse = attention_with_lse(query, key, value, attn_mask=mask)
        if with_lse is not None:
            return with_lse
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=0.0, is_causal=False
    )
    return output, None


def _key_states(attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> Tensor:
    if encoder_hidden_states is None:
        return hidden_states
    if attn.norm_cross:
        normalised: Tensor = attn.norm_encoder_hidden_states(encoder_hidden_states)
        return normalised
    return encoder_hidden_states


def _heads(attn: Any, *projections: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (
        states.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for states in projections
    )
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return query, key, value
