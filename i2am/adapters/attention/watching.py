"""Processors that stay: those with weights of their own, as IP-Adapter's, and third-party ones.

While it is recorded, such an object is an instance of a subclass of its class, which watches its
``scaled_dot_product_attention`` calls. A compiled graph breaks there.
"""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    AttnProcessor,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode

from i2am.adapters.attention.attending import Attend, attend_beside, record_given, sdpa_call
from i2am.adapters.attention.projections import additive_mask, key_states, split_heads
from i2am.adapters.attention.sites import Record, takes
from i2am.adapters.guard import UNGUARDED
from i2am.adapters.multipliers import AdapterCall, adapter_calls

_WATCHED = "_i2am_records"
# These compute attention by other means, and project without norms of query and key
_WITHOUT_SDPA = (AttnProcessor, SlicedAttnProcessor, XFormersAttnProcessor)


def install_watching(
    attn: Any,
    record: Record,
    attend: Attend = attend_beside,
    guard: AbstractContextManager[Any] = UNGUARDED,
) -> Callable[[], None]:
    """Watch the processor of one attention module; returns what puts everything back."""
    processor = attn.processor
    # one processor object may serve many modules: the recorders are kept by module
    base: Any = type(processor)
    if _WATCHED in vars(processor):
        base = base.__mro__[1]
    else:
        processor.__class__ = _watching_class(base)
        vars(processor)[_WATCHED] = {}
    vars(processor)[_WATCHED][attn] = record, attend, guard

    def restore() -> None:
        records = vars(processor)[_WATCHED]
        del records[attn]
        if not records:
            del vars(processor)[_WATCHED]
            processor.__class__ = base
        if type(attn.processor) is _watching_class(base) and _WATCHED not in vars(attn.processor):
            attn.processor.__class__ = base

    return restore


@functools.cache  # one class for all processors of a class: they are recognised by it
def _watching_class(base: Any) -> Any:
    """A subclass of a processor's class with the same signature, constructor and ``isinstance``."""

    @torch.compiler.disable  # a function mode inside a compiled graph would see nothing
    def watch(self: Any, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        watched = vars(self).get(_WATCHED, {}).get(attn)
        if watched is None or not takes(watched[0]):
            return base.__call__(self, attn, hidden_states, *args, **kwargs)
        record, attend, guard = watched
        given = signature.bind(self, attn, hidden_states, *args, **kwargs).arguments
        with _WatchAttention(record, attend, guard, _calls(self, given)):
            output = base.__call__(self, attn, hidden_states, *args, **kwargs)
        if base in _WITHOUT_SDPA:
            with guard:
                _record_projections(record, attn, given)
        return output

    def __call__(self: Any, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return watch(self, attn, hidden_states, *args, **kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # copied and pickled as what it was
        return made_of, (base, {n: value for n, value in vars(self).items() if n != _WATCHED})

    # modules pass on only the keywords that the signature names
    signature = inspect.signature(base.__call__)
    __call__.__signature__ = signature  # type: ignore[attr-defined]
    contents = {"__call__": __call__, "__reduce_ex__": __reduce_ex__}
    return type(f"Recording{base.__name__}", (base,), contents)


def made_of(kind: Any, attributes: dict[str, Any]) -> Any:
    """An instance of a class with given attributes, which it does not copy."""
    made = kind.__new__(kind)
    made.__dict__ = attributes
    return made


def _calls(processor: Any, given: dict[str, Any]) -> Iterator[AdapterCall]:
    """Indices and multipliers of a processor's attention calls, as if none were left out."""
    context = given.get("encoder_hidden_states")
    if hasattr(processor, "to_k_ip") and hasattr(processor, "scale"):
        of_unet = isinstance(context, tuple)
        if of_unet or given.get("ip_hidden_states") is not None:
            states = given["hidden_states"]
            queries = math.prod(states.shape[2:]) if states.ndim == 4 else states.shape[1]
            yield from adapter_calls(processor, given, queries)
            return
    yield from ((index, None) for index in itertools.count())


class _WatchAttention(TorchFunctionMode):
    """Makes every ``scaled_dot_product_attention`` call as it is told to, and records it."""

    def __init__(
        self,
        record: Record,
        attend: Attend,
        guard: AbstractContextManager[Any],
        calls: Iterator[AdapterCall],
    ) -> None:
        super().__init__()
        self.record = record
        self.attend = attend
        self.guard = guard
        self.calls = calls
        self.made = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        output, given, lse = sdpa_call(self.guard, self.attend, args, kwargs)
        with self.guard:
            index, multiplier = next(self.calls, (self.made, None))
            self.made += 1
            known: dict[str, Any] = {} if multiplier is None else {"multiplier": multiplier}
            record_given(self.record, given, query_lse=lse, call_index=index, **known)
        return output


def _record_projections(record: Record, attn: Any, given: dict[str, Any]) -> None:
    """Project once more what a processor that makes no call to watch was given."""
    hidden_states, context = given["hidden_states"], given.get("encoder_hidden_states")
    if attn.spatial_norm is not None:
        hidden_states = attn.spatial_norm(hidden_states, given.get("temb"))
    if hidden_states.ndim == 4:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    mask = additive_mask(
        attn, hidden_states if context is None else context, given.get("attention_mask")
    )
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
    states = key_states(attn, hidden_states, context)
    query, key = split_heads(attn, attn.to_q(hidden_states), attn.to_k(states))
    known = {}
    if getattr(record, "values", False):
        known["value"] = split_heads(attn, attn.to_v(states))[0]
    record(query, key, bias=mask, scale=attn.scale, **known)
