"""How much memory a recording will take, and how much there is."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from i2am.attribution import AttributionMaps
from i2am.cli.errors import InputRejected
from i2am.kernels.streaming import TILE_ELEMENTS
from i2am.memory import available_memory, readable
from i2am.wording import counted


@dataclass(frozen=True)
class Estimate:
    """Bytes of one recording, beside the model's own memory.

    Attributes:
        layers: Number of layers recorded.
        stays: Sums that stay after the run, all recorded halves of guidance together.
        transient: What the run needs on top: sums of both halves of guidance before it is known
            which is which, and one tile of attention, or all of one layer's where keys are kept.
        images: Pixels of the generated and the given images, as fp32.
        available: Free memory of the device, None where it cannot be told.
    """

    layers: int
    stays: int
    transient: int
    images: int
    available: int | None

    def check(self) -> None:
        """Refuse a recording that does not fit.

        Raises:
            InputRejected: Less is available than is needed.
        """
        needed = self.stays + self.transient + self.images
        if self.available is not None and needed > self.available:
            raise InputRejected(
                f"not enough memory: the maps need about {readable(needed)} "
                f"({readable(self.stays)} that stay, {readable(self.transient)} during the run), "
                f"{readable(self.available)} are available; ask for fewer regions or time groups, "
                "or for preset paper"
            )

    def as_dict(self) -> dict[str, Any]:
        """JSON values, in bytes."""
        return asdict(self)

    @property
    def lines(self) -> list[str]:
        """What to tell people."""
        available = "unknown" if self.available is None else readable(self.available)
        return [
            f"maps that stay      {readable(self.stays)} in {counted(self.layers, 'layer')}",
            f"during the run      {readable(self.transient)} more",
            f"images              {readable(self.images)}",
            f"memory available    {available}",
            "nothing was written",
        ]


def estimate(
    probe: AttributionMaps,
    *,
    time_groups: int,
    votes: int,
    rows: int,
    keys: Mapping[str, int] | None,
    branches: int,
    guided: bool,
    pixels: int,
    device: torch.device,
) -> Estimate:
    """Scale the sums of a probe to a whole recording.

    Args:
        probe: Maps of the same model at the same size, one sample, whatever their rows; with
            pair maps if these are to be recorded.
        time_groups: Time groups of the recording.
        votes: Vote vectors of R2G.
        rows: Weight rows of G2R.
        keys: Number of keys per layer if R2G is kept for each of them, None if it is not.
        branches: Halves of guidance that are kept.
        guided: Whether the model evaluates both halves.
        pixels: Pixels of all images together.
        device: Where the sums live.
    """
    stays = 0
    halves = 2 if guided else 1
    tile = 0 if device.type == "cuda" else 4 * TILE_ELEMENTS
    for layer in probe.layer_sums:
        site = layer.site
        cells = math.prod(site.generated_grid)
        # R2G and the attention share
        values = 2 * votes * cells
        if layer.generated_to_reference is not None:
            values += rows * site.reference_tokens
        if keys is not None:
            values += keys[site.layer] * cells
            # the scores, their softmax, and the softmax without keys that nobody sees
            tile = max(tile, halves * 3 * 4 * site.heads * cells * keys[site.layer])
        # and one number of calls per time group
        stays += 4 * time_groups * (site.heads * values + 1)
    if (pairs := probe.pairs) is not None:
        slices = pairs.time_groups + pairs.heads
        stays += pairs.nbytes // slices * (time_groups + pairs.heads)
    return Estimate(
        layers=len(probe.layer_sums),
        stays=branches * stays,
        transient=halves * stays + tile,
        images=12 * pixels,
        available=available_memory(device),
    )
