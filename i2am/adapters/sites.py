"""The way from a layer to its recorder: an operator, so that compiled graphs keep the call."""

from collections.abc import Callable

import torch
from torch import Tensor

Listener = Callable[[int, int, Tensor, Tensor, Tensor | None, float | None, Tensor | None], None]
"""``listener(layer, call_index, query, key, bias, scale, query_lse)``"""

Record = Callable[..., None]
"""``record(query, key, *, bias=None, scale=None, query_lse=None, call_index=0)``"""

LISTENERS: dict[int, Listener] = {}
"""Who listens, by the number that sites carry; a site nobody listens to does nothing."""


class Site:
    """The ``record`` callable of one layer.

    Args:
        listener: Key in :data:`LISTENERS`.
        layer: Index of the layer, handed on.
    """

    def __init__(self, listener: int, layer: int) -> None:
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
    ) -> None:
        torch.ops.i2am.record_attention(
            self.address, query.detach(), key.detach(), bias, scale, query_lse, call_index
        )


# address: a write that nobody makes, so that no compiler drops or reorders the call
@torch.library.custom_op("i2am::record_attention", mutates_args=("address",))
def _record_attention(
    address: Tensor,
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    scale: float | None,
    query_lse: Tensor | None,
    call_index: int,
) -> None:
    listener, layer = address.tolist()
    # the garbage collector, too, may detach a recorder, at any moment
    if (listen := LISTENERS.get(listener)) is not None:
        listen(layer, call_index, query, key, bias, scale, query_lse)


@_record_attention.register_fake
def _(address, query, key, bias, scale, query_lse, call_index):  # type: ignore[no-untyped-def]
    return None
