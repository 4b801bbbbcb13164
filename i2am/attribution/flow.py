"""Where on the reference every generated patch looks: a mean place and how far it spreads."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from i2am.attribution.layers import multiplied
from i2am.attribution.sums import LayerSums


class Flow(NamedTuple):
    """Where patches look, all fp32; NaN where a patch does not look at the reference at all."""

    place: Tensor
    """``[samples, ..., 2, height, width]``: row and column on the reference, 0 at its upper and
    left edge, 1 at the others."""
    spread: Tensor
    """``[samples, ..., height, width]``: root mean square distance from there, in the same unit."""
    share: Tensor
    """``[samples, ..., height, width]``: the part of a patch's attention that goes there."""


def read_flow(
    layers: Sequence[LayerSums],
    read: Callable[[Callable[[LayerSums], Tensor]], Tensor],
    share: Tensor,
) -> Flow:
    """The flow of layers of one reference.

    Args:
        layers: The layers.
        read: Reduces what a function picks of each layer, ``[samples, time groups, heads, frames,
            h, w]``.
        share: Their attention share, read likewise.

    Raises:
        ValueError: The places were not recorded, or a layer's tokens have none.
    """
    for layer in layers:
        if layer.places is None:
            raise ValueError(
                "flow() needs the places that were looked at, record(flow=True), of reference "
                f"tokens that have one; {layer.site.layer} has none"
            )

    def moment(number: int | None) -> Tensor:
        def pick(layer: LayerSums) -> Tensor:
            assert layer.places is not None
            assert layer.attention_share is not None
            held = layer.attention_share[:, :, :, 0]
            if number is not None:
                held = layer.places[:, :, :, number]
            held = held if layer.site.frames > 1 else held[:, :, :, None]
            return multiplied(held, layer.multiplier)

        return read(pick)

    looked = moment(None)
    y, x, squares = (moment(number) / looked for number in range(3))
    spread = (squares - y**2 - x**2).clamp_min(0).sqrt()
    return Flow(torch.stack([y, x], dim=-3), spread, share)
