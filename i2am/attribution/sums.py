"""What is kept of a layer: its sums, and where they were recorded."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from i2am.attribution.grid import Grid

Measure = Literal["share", "spread"]


@dataclass(frozen=True)
class AttentionSite:
    """Where attention was recorded and what its tokens stand for."""

    layer: str
    """Path of the attention module in the denoiser."""
    heads: int
    generated_grid: Grid
    """``(height, width)`` of the query tokens, row-major."""
    reference_grid: Grid | None
    """``(height, width)`` of the reference tokens, row-major; ``None`` where they have no place."""
    reference_tokens: int
    informative: bool = True
    """False for a single reference token, attention to which is 1 whatever query and key are, and
    for a branch that the layer multiplies by 0."""
    merged: tuple[str, ...] = ()
    """Layers whose resized sums these are (``sums="resized"``); empty for a layer by itself."""
    source: str = "reference"
    """What the reference tokens are: the name of a span, or a word."""
    role: str = "reference"
    """``"reference"``, or ``"text"`` for words."""
    frames: int = 1
    """How many grids of query tokens follow one another: frames of a video."""
    measure: Measure = "spread"
    """How R2G is read by default: ``"share"`` of words, and of references in one sequence with the
    generated image."""
    tags: tuple[str, ...] = ()
    """What the layout calls the layer, for presets: ``"mid"``, ``"warp:4"``; of all merged ones."""

    alone: bool = False
    """Whether the reference tokens are all that the layer's queries can attend to."""

    @property
    def spread_over_heads(self) -> bool:
        """Whether the spread is kept as a mean over heads: of resized sums, where it is not the
        default measure."""
        return bool(self.merged) and self.measure == "share"

    @property
    def cells(self) -> int:
        """Number of query tokens."""
        return self.frames * self.generated_grid[0] * self.generated_grid[1]

    @property
    def generated_shape(self) -> tuple[int, ...]:
        """``(height, width)`` of the query tokens, ``(frames, height, width)`` of a video's."""
        return self.generated_grid if self.frames == 1 else (self.frames, *self.generated_grid)


@dataclass(frozen=True)
class LayerSums:
    """Raw fp32 sums of one layer over the recorded evaluations of each time group."""

    site: AttentionSite
    reference_to_generated: Tensor | None
    """``[samples, time_groups, heads, votes, (frames), h, w]``; a word has one vote."""
    generated_to_reference: Tensor | None
    """``[samples, time_groups, heads, rows, h_I, w_I]``: reference tokens only, while ``P`` is
    normalized over all keys; ``None`` without a reference grid."""
    reference_to_generated_by_key: Tensor | None = None
    """``[samples, time_groups, heads, voters, h, w]``: ``C`` of each voter, on request only."""
    attention_share: Tensor | None = None
    """Likewise: the part of each patch's attention, ``P v``, that goes to the reference tokens, and
    to those in the reference mask."""
    places: Tensor | None = None
    """``[samples, time_groups, heads, 3, (frames), h, w]``, on request: the sums over the reference
    tokens of ``P`` times ``y``, ``x`` and ``y^2 + x^2``, places in [0, 1]."""
    attention_norm: Tensor | None = None
    """Like the share, on request: the sums over the tokens of ``P`` times ``|| W_o v ||``, the norm
    of what a token brings through the output projection of its head."""
    generated_to_reference_conditional: Tensor | None = None
    """``[samples, time_groups, heads, rows, h_I, w_I]``, on request: G2R of the uniform row and the
    mask's while ``P`` is normalized over the reference tokens; ``None`` also where those are all
    keys."""
    calls: Tensor | None = None
    """``[samples, time_groups]``: how many calls were added up."""
    multiplier: Tensor | None = None
    """``[time_groups, h, w]``: what the layer multiplies its branch by, scale times mask of an
    adapter; ``None`` for 1. The sums are without it, and maps are read with it: R2G times it, G2R
    times its mean over the grid."""
