"""Where the paper and its published code disagree: one named switch each."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from i2am.attribution.grid import ResizeMode


@dataclass(frozen=True)
class Preset:
    """One choice per switch; build your own with ``dataclasses.replace(PAPER, without=("mid",))``.

    Some switches belong to the recording and cannot be changed when maps are read: the published
    code lets prefix tokens (CLS) vote in R2G, which needs a recording whose votes include them.

    Attributes:
        name: What the preset is called.
        grid_resize: How maps are resized from a layer's grid to the common one.
        clamp_after_grid_resize: Clamp at 0 after that, per head and key and before any mean over
            them; not linear, so the exact result needs sums kept per head and key.
        without: Tags of layers that do not count, ``"mid"`` for the middle block.
        only: Of layers with a tag of these names, the ones that count: ``"warp:4"`` leaves out
            every other ``"warp:..."`` and nothing else. The published code reads StableVITON's
            warp block 4 alone (32 x 24 at 512 x 384), and per time group the three of that grid,
            ``dataclasses.replace(OFFICIAL, only=("warp:3", "warp:4", "warp:5"))``.
        invert_single_token: Draw and score ``1 - map`` for R2G of layers with one reference token.
        query_mask: Weight the generated patches of IMACS_r by the inpainting mask (eq 17).
        reference_mask_product: Multiply G2R maps by the reference mask before normalizing.
        normalizations: Min-max once, on the grid, or twice, on the grid and again on pixels. Once,
            what bicubic resizing pushes outside [0, 1] is clamped.
        reference_epsilon: Added to the denominators of IMACS_r.
    """

    name: str
    grid_resize: ResizeMode
    clamp_after_grid_resize: bool
    without: tuple[str, ...]
    only: tuple[str, ...]
    invert_single_token: bool
    query_mask: bool
    reference_mask_product: bool
    normalizations: Literal[1, 2]
    reference_epsilon: float

    def counts(self, tags: Iterable[str]) -> bool:
        """Whether all layers that have these tags among them count."""
        names = {tag.partition(":")[0] for tag in self.only}
        return not any(
            tag in self.without or (tag.partition(":")[0] in names and tag not in self.only)
            for tag in tags
        )


PAPER = Preset(
    name="paper",
    grid_resize="bilinear",
    clamp_after_grid_resize=False,
    without=(),
    only=(),
    invert_single_token=False,
    query_mask=True,
    reference_mask_product=False,
    normalizations=1,
    reference_epsilon=0.0,
)
OFFICIAL = Preset(
    name="official",
    grid_resize="bicubic",
    clamp_after_grid_resize=True,
    without=("mid",),
    only=("warp:4",),
    invert_single_token=True,
    query_mask=False,
    reference_mask_product=True,
    normalizations=2,
    reference_epsilon=1e-8,
)


def get_preset(preset: str | Preset) -> Preset:
    """The preset of that name; a :class:`Preset` is returned as it is.

    Raises:
        ValueError: If no preset has that name.
    """
    if isinstance(preset, Preset):
        return preset
    for known in (PAPER, OFFICIAL):
        if preset == known.name:
            return known
    raise ValueError(f"preset must be 'paper', 'official' or a Preset, got {preset!r}")
