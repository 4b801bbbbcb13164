"""Processors of diffusers that keep their own code, in a module in which attention is recorded.

The code of a processor finds ``dispatch_attention_fn`` or ``F.scaled_dot_product_attention`` by
name in its module. Here the same code runs in a stand-in of that module, where these two hand over
query and key before they attend. Nothing is copied, whole compiled graphs keep the recording, and
backends that make no call of PyTorch's (FlexAttention, SageAttention) are recorded too.

A recorded layer gets a processor of its own, also where several share one. All of one class have
the same recording class, and what differs from layer to layer is an attribute: so compiled code is
the same for all layers, and for later recordings.
"""

import functools
import sys
import threading
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i2am.adapters.attention.attending import (
    Attend,
    Attended,
    attend_beside,
    attend_given,
    record_given,
    sdpa_call,
)
from i2am.adapters.attention.sites import Record, takes
from i2am.adapters.attention.stand_ins import StandIn
from i2am.adapters.attention.watching import made_of

_DISPATCH_ARGUMENTS = (
    "query",
    "key",
    "value",
    "attn_mask",
    "dropout_p",
    "is_causal",
    "scale",
    "enable_gqa",
    "attention_kwargs",
)


class Recording:
    """Who is told of one layer's calls, and how it attends meanwhile."""

    def __init__(self, record: Record, attend: Attend, guard: AbstractContextManager[Any]) -> None:
        self.record = record
        self.attend = attend
        self.guard = guard


class _Open(threading.local):
    """The layer that attends in this thread, and how many calls it has made."""

    recording: Recording | None = None
    made = 0


_OPEN = _Open()


def install_rebound(
    attn: Any, record: Record, attend: Attend, guard: AbstractContextManager[Any]
) -> Callable[[], None] | None:
    """Record one attention module by rebinding its processor's code.

    Args:
        attn: The module.
        record: What to hand query and key to.
        attend: How it attends meanwhile.
        guard: What recording and attending are inside of.

    Returns:
        A function that puts everything back; ``None`` if the processor is none of diffusers', has
        weights of its own, or does not attend by functions that its module names.
    """
    original = attn.processor
    kind = _recording_class(_plain_class(type(original)))
    if kind is None:
        return None
    # the very same attributes: what is set in the meantime, such as a backend, is set on both
    ours = made_of(kind, vars(original))
    ours._i2am_recording = Recording(record, attend, guard)
    for stand_in in kind.stand_ins:
        stand_in.enter()
    try:
        _set_processor(attn, ours)
    except BaseException:
        for stand_in in kind.stand_ins:
            stand_in.leave()
        raise

    def restore() -> None:
        ours._i2am_recording = None  # a copy that is still used only attends
        for stand_in in kind.stand_ins:
            stand_in.leave()
        if attn.processor is ours:
            _set_processor(attn, original)
        elif type(attn.processor) is kind and attn.processor._i2am_recording is None:
            # (un)loading adapters makes new processors of the classes that it finds
            _set_processor(attn, made_of(kind.base, vars(attn.processor)))

    return restore


def _set_processor(attn: Any, processor: Any) -> None:
    if hasattr(attn, "set_processor"):
        attn.set_processor(processor)
    else:  # MochiAttention
        attn.processor = processor


class _Rebound:
    """Base of the recording classes: instances are copied and pickled as what they stand for."""

    __slots__ = ("_i2am_recording",)

    # beside the attributes that are shared with the original
    _i2am_recording: Recording | None
    base: type
    stand_ins: tuple[StandIn, ...]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__new__(cls)
        made._i2am_recording = None
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return made_of, (self.base, self.__dict__)


def _plain_class(kind: type) -> type:
    return kind.base if issubclass(kind, _Rebound) else kind


@functools.cache  # compiled code knows it by its identity
def _recording_class(base: type) -> Any:
    """A subclass of a processor's class that records; ``None`` where that cannot be."""
    if issubclass(base, nn.Module) or base.__module__.split(".")[0] != "diffusers":
        return None
    found: dict[str, Any] = {}
    stand_ins = {}
    for owner in base.__mro__:
        for name, function in vars(owner).items():
            if name in found or not isinstance(function, types.FunctionType):
                continue
            stand_in = _stand_in(function.__module__)
            if stand_in is not None and stand_in.attends(function):
                found[name] = stand_in.rebind(function)
                stand_ins[function.__module__] = stand_in
    if not found or not isinstance(base.__call__, types.FunctionType):
        return None
    plain: Any = base.__call__
    rebound = found.get("__call__", plain)

    # modules pass on only the keywords that the signature names, which this keeps
    @functools.wraps(plain)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        # read once: the recorder may be detached in the middle of a call
        recording = self._i2am_recording
        if recording is None or not (torch.compiler.is_compiling() or takes(recording.record)):
            return plain(self, *args, **kwargs)
        _OPEN.recording, _OPEN.made = recording, 0
        try:
            return rebound(self, *args, **kwargs)
        finally:
            _OPEN.recording = None

    contents = found | {
        "__slots__": (),
        "__call__": __call__,
        "base": base,
        "stand_ins": tuple(stand_ins.values()),
    }
    return type(f"Recording{base.__name__}", (_Rebound, base), contents)


@functools.cache
def _stand_in(name: str) -> StandIn | None:
    source = sys.modules.get(name)
    if source is None or name.split(".")[0] != "diffusers":
        return None
    return StandIn(source, dispatch=_dispatching(source), attend=_attending)


def _attending(*args: Any, **kwargs: Any) -> Any:
    """``scaled_dot_product_attention`` that is recorded."""
    recording = _OPEN.recording
    if recording is None:
        return F.scaled_dot_product_attention(*args, **kwargs)
    output, given, lse = sdpa_call(recording.guard, recording.attend, args, kwargs)
    _hand_over(recording, given, lse)
    return output


def _dispatching(source: Any) -> Callable[..., Any]:
    """``dispatch_attention_fn`` that is recorded; it takes ``[batch, seqlen, heads, head_dim]``."""

    def dispatch_attention_fn(*args: Any, **kwargs: Any) -> Any:
        recording, dispatch = _OPEN.recording, source.dispatch_attention_fn
        if recording is None:
            return dispatch(*args, **kwargs)
        given = dict(zip(_DISPATCH_ARGUMENTS, args, strict=False)) | kwargs
        query, key, mask = given["query"], given["key"], given.get("attn_mask")
        # of every backend: a mask by key
        if isinstance(mask, Tensor) and mask.shape == (len(query), key.shape[1]):
            given["attn_mask"] = mask[:, None, None]
        for name in ("query", "key", "value"):
            given[name] = given[name].transpose(1, 2)
        attended = _attend(recording, dispatch, given)
        if attended is None:
            output, lse = dispatch(*args, **kwargs), None
        else:
            output, lse = attended[0].transpose(1, 2), attended[1]
        _hand_over(recording, given, lse)
        return output

    return dispatch_attention_fn


def _attend(recording: Recording, dispatch: Any, given: dict[str, Any]) -> Attended | None:
    if given.get("attention_kwargs") or given.get("parallel_config") is not None:
        return None
    beside = recording.attend is attend_beside
    if beside and (torch.compiler.is_compiling() or not _is_native(dispatch, given)):
        return None
    return attend_given(recording.guard, recording.attend, given)


def _is_native(dispatch: Any, given: dict[str, Any]) -> bool:
    """Whether diffusers makes this call by ``scaled_dot_product_attention``, and no other way."""
    from diffusers.models import attention_dispatch

    if dispatch is not attention_dispatch.dispatch_attention_fn:
        return False
    backend = given.get("backend")
    if backend is None:
        backend = attention_dispatch._AttentionBackendRegistry.get_active_backend()[0]
    return bool(backend == attention_dispatch.AttentionBackendName.NATIVE)


def _hand_over(recording: Recording, given: dict[str, Any], lse: Tensor | None) -> None:
    index, mask = _OPEN.made, given.get("attn_mask")
    _OPEN.made = index + 1
    known = {"query_lse": lse, "call_index": index}
    dense = mask is None or isinstance(mask, Tensor)
    if torch.compiler.is_compiling():
        # a graph holds no guard: what is refused below is left out, and the report misses it
        if dense and not given.get("is_causal"):
            record_given(recording.record, given, **known)
        return
    with recording.guard:
        if not dense:
            raise NotImplementedError(
                f"recording attention under a mask of blocks is not supported, got a "
                f"{type(mask).__name__}"
            )
        record_given(recording.record, given, **known)
