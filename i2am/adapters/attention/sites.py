"""The way from a layer to its recorder: an operator, so that compiled graphs keep the call."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

Listener = Callable[..., None]
"""``listener(layer, call_index, query, key, bias, scale, query_lse, multiplier, value)``:
``multiplier`` ``[1 or seqlen_q]`` is what the layer multiplies the call's output by, ``None`` for
1; ``value`` is ``None`` unless the listener asked for values."""

Record = Callable[..., None]
"""``record(query, key, *, bias, scale, query_lse, call_index, multiplier, value)``: all these may
be left out; ``value`` is given to those alone whose attribute ``values`` is true."""

LISTENERS: dict[int, Listener] = {}
"""Who listens, by the number that sites carry; a site nobody listens to does nothing."""

NUMBERS = itertools.count()
"""Of listeners, and of those whose calls are taken."""


class Site:
    """The ``record`` callable of one layer.

    Args:
        listener: Key in :data:`LISTENERS`.
        layer: Index of the layer, handed on.
        here: Whether the listener takes calls that come from here.
        values: Whether it wants their values.
    """

    def __init__(
        self,
        listener: int,
        layer: int,
        here: Callable[[], bool] = lambda: True,
        *,
        values: bool = False,
    ) -> None:
        self.here = here
        self.values = values
        # Numbers in a tensor, not in attributes: compiled code is guarded by the latter's values,
        # and would be compiled once more for every layer and every recording.
        with torch.inference_mode(False):
            self.address = torch.tensor([listener, layer], device="cpu")

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        *,
        bias: Tensor | None = None,
        scale: float | None = None,
        query_lse: Tensor | None = None,
        call_index: int = 0,
        multiplier: Tensor | None = None,
        value: Tensor | None = None,
    ) -> None:
        torch.ops.i2am.record_attention(
            self.address,
            query.detach(),
            key.detach(),
            bias,
            scale,
            query_lse,
            call_index,
            multiplier,
            None if value is None else value.detach(),
        )


def takes(record: Record) -> bool:
    """Whether a layer's call from here is recorded."""
    here: Callable[[], bool] | None = getattr(record, "here", None)
    return here is None or here()


def wanted(record: Record, value: Tensor) -> dict[str, Tensor]:
    """The keyword that hands a call's value over, if ``record`` takes values."""
    return {"value": value} if getattr(record, "values", False) else {}


# address: declared as written to though it is not, so that no compiler drops or reorders the call
@torch.library.custom_op("i2am::record_attention", mutates_args=("address",))
def _record_attention(
    address: Tensor,
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    scale: float | None,
    query_lse: Tensor | None,
    call_index: int,
    multiplier: Tensor | None,
    value: Tensor | None,
) -> None:
    listener, layer = address.tolist()
    # the garbage collector, too, may detach a recorder, at any moment
    if (listen := LISTENERS.get(listener)) is not None:
        listen(layer, call_index, query, key, bias, scale, query_lse, multiplier, value)


@_record_attention.register_fake
def _(address, query, key, bias, scale, query_lse, call_index, multiplier, value):  # type: ignore[no-untyped-def]
    return None
