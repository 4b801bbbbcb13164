"""Which tokens of an attention call are the generated image's, the references' and the prompt's.

A layout is all that distinguishes one model family from another. It answers, for a call of a layer,
with named spans of the query and of the key sequence. Families are small functions in this package;
a new one needs no other change.
"""

import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from i2am.attribution.grid import Grid
from i2am.layouts.spans import Sequences

CONDITIONAL = "conditional"
UNCONDITIONAL = "unconditional"

_LEVEL = re.compile(r"(?P<block>down|up|mid)_block(s\.(?P<number>\d+))?\.")

CROSS_ATTENTION_LAYERS = r"transformer_blocks\.\d+\.attn2$"


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention function, as the layout sees it."""

    layer: str
    """Path of the attention module in the denoiser."""
    call_index: int
    """0-based index among the attention calls of one invocation of the layer, counting those that
    an IP-Adapter of scale 0 leaves out."""
    seqlen_q: int
    seqlen_k: int


Read = TypeVar("Read")


@dataclass(frozen=True)
class Frame:
    """What one call of the denoiser was given."""

    size: Grid | None
    """Height and width of an input ``[batch, channels, height, width]``, ``None`` for others."""
    arguments: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Its arguments by the names of ``forward``, also those that were given by position."""
    config: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The denoiser's configuration."""
    row: int = 0
    """The row of the batch that is asked about, for layouts whose rows differ (``ragged``)."""
    run: dict[Any, Any] = field(default_factory=dict, compare=False)
    """What a layout wants to remember; empty when a run begins."""
    rounds_up: bool = True
    """Whether its strided convolutions halve 5 to 3, as with padding; without, to 2."""
    levels: int | None = None
    """How many levels a UNet has, ``None`` for other denoisers."""

    def once(self, tensor: Tensor, read: Callable[[Tensor], Read]) -> Read:
        """``read(tensor)``, once for each tensor of the run: reading one waits for its device.

        Args:
            tensor: An argument of the denoiser that a pipeline makes once, such as ``img_ids``.
            read: What to make of its values.
        """
        version = 0 if tensor.is_inference() else tensor._version
        held, known, value = self.run.get((id(tensor), read), (None, None, None))
        if held is None or held() is not tensor or known != version:
            value = read(tensor)
            self.run[id(tensor), read] = weakref.ref(tensor), version, value
        return value

    def level_grid(self, tokens: int, layer: str = "") -> Grid | None:
        """The grid of a UNet level with that many tokens, ``None`` if no level has.

        Never a square root: grids may have any shape.

        Args:
            tokens: How many.
            layer: Path of the layer that has them: where it names its level, no other will do
                (merged tokens, tiles and windows may be as many as another level has).

        Raises:
            ValueError: The input of the denoiser has no height and width.
        """
        if self.size is None:
            raise ValueError(
                "layout must give the grid of the generated tokens where the denoiser's input is "
                "not [batch, channels, height, width], got one that asks for a level of a UNet"
            )
        height, width = self.size
        own = self.own_grid(layer)
        if own is not None:
            return own if own[0] * own[1] == tokens else None
        while height * width > tokens and (height, width) != (1, 1):
            height, width = self._halved(height, width)
        return (height, width) if height * width == tokens else None

    def own_grid(self, layer: str) -> Grid | None:
        """The grid of the UNet level where a layer is, ``None`` if its path does not tell."""
        level = self._level(layer)
        if self.size is None or level is None:
            return None
        height, width = self.size
        for _ in range(level):
            height, width = self._halved(height, width)
        return height, width

    def _halved(self, height: int, width: int) -> Grid:
        return max((height + self.rounds_up) // 2, 1), max((width + self.rounds_up) // 2, 1)

    def _level(self, layer: str) -> int | None:
        """How often the input was halved where a layer is, ``None`` if its path does not tell."""
        if self.levels is None or (found := _LEVEL.match(layer)) is None:
            return None
        block, number = found["block"], int(found["number"] or 0)
        if block == "down":
            return number
        return self.levels - 1 - number  # the middle is where the way up begins


def of_middle(layer: str) -> tuple[str, ...]:
    """The tag of layers in the middle block of a UNet."""
    return ("mid",) if "mid_block" in layer.split(".") else ()


@dataclass(frozen=True)
class Encoder:
    """A text encoder of a pipeline whose tokens are those of a text span.

    Args:
        component: Attribute of the pipeline, ``"text_encoder"``, ``"text_encoder_2"``...
        tokenizer: Attribute of the pipeline that makes its token ids.
        span: Name of the text span of the keys.
        dropped: Tokens that the pipeline cuts off in front, such as a template's.
    """

    component: str = "text_encoder"
    tokenizer: str = "tokenizer"
    span: str = "text"
    dropped: int = 0


@dataclass(frozen=True)
class TokenLayout:
    """What the tokens of every recorded attention call of a model family stand for.

    Args:
        name: Family name, kept with the result.
        spans: ``(call, frame) -> Sequences``: named spans of the query and the key sequence, one
            span of the queries being generated; ``None`` for a call that is not to be recorded.
        layers: Regular expression searched in the paths of the attention modules.
        guidance_order: Names of the classifier-free guidance parts in one batch, in order and all
            of them: a batch of more or fewer parts, but for one of conditional rows alone, is not
            recorded. Where parts come as calls of their own, it is the order of the calls of one
            evaluation. Default what is known of the pipeline; else unconditional before conditional
            in a batch, while separate calls of unknown order are not recorded (or need names, see
            :meth:`i2am.Recorder.calls`).
        prefix_votes: Let all keys of the call, prefix tokens included, share the uniform R2G vote
            (preset ``official``) instead of the reference tokens alone.
        note: What a reader of the maps has to know of these tokens, kept with the result.
        context_keys: Whether all keys of its layers are a context's, so that layers whose keys are
            also the image's own are refused before a run.
        through_processor: Whether reference pictures pass through the pipeline's image processor
            (``feature_extractor``), which may keep the middle alone.
        ragged: Whether rows of a batch may have different spans; then ``spans`` is asked once per
            row, ``frame.row``.
        encoders: Whose tokens the text spans are, for words of the prompt.
        no_reference: Where a model has no reference tokens, one sentence why: its words alone can
            be recorded.
        tags: ``path -> names`` of a layer, by which presets leave layers out; default ``("mid",)``
            in the middle block of a UNet.
        sums: ``"resized"`` for families whose native sums are too large to be a default, see
            :func:`i2am.record`.

    Raises:
        ValueError: ``guidance_order`` does not contain ``"conditional"``.
    """

    name: str
    spans: Callable[[AttentionCall, Frame], Sequences | None]
    layers: str = CROSS_ATTENTION_LAYERS
    guidance_order: tuple[str, ...] | None = None
    prefix_votes: bool = False
    note: str = ""
    context_keys: bool = False
    through_processor: bool = False
    ragged: bool = False
    encoders: tuple[Encoder, ...] = ()
    no_reference: str = ""
    tags: Callable[[str], tuple[str, ...]] = of_middle
    sums: str = "native"

    def __post_init__(self) -> None:
        if self.guidance_order is not None and CONDITIONAL not in self.guidance_order:
            raise ValueError(
                f"guidance_order must contain {CONDITIONAL!r}, got {self.guidance_order}"
            )

    def matches(self, layer: str) -> bool:
        """Whether the layer of that path is recorded."""
        return re.search(self.layers, layer) is not None

    @staticmethod
    def cross_attention(grid: Grid, prefix: int = 1, **options: Any) -> "TokenLayout":
        """Keys are ``prefix`` tokens (CLS, registers) and then the reference patches of ``grid``.

        Args:
            grid: ``(height, width)`` of the reference patches.
            prefix: Tokens before them.
            **options: ``layers``, ``guidance_order``, ``prefix_votes``, ``note`` of
                :class:`TokenLayout`.

        Raises:
            ValueError: The grid is empty or ``prefix`` negative.
        """
        from i2am.layouts.cross_attention import patch_tokens

        return patch_tokens(grid, prefix, **options)

    @staticmethod
    def single_token(**options: Any) -> "TokenLayout":
        """One reference token per layer (Paint-by-Example, DCI-VTON): R2G only, not informative."""
        from i2am.layouts.cross_attention import single_token

        return single_token(**options)

    @staticmethod
    def same_grid(layers: str = CROSS_ATTENTION_LAYERS, **options: Any) -> "TokenLayout":
        """Keys are a feature map on the query's own grid."""
        from i2am.layouts.cross_attention import same_grid

        return same_grid(layers, **options)

    @staticmethod
    def stableviton(*, unet_layers: bool = False, **options: Any) -> "TokenLayout":
        """The warp blocks of StableVITON, whose keys are a feature map on the query's own grid.

        Those keys mix garment and person: the spatial encoder that makes them sees the garment's
        latents and the whole noisy input of the UNet. The cross-attentions inside the spatial
        encoder, to the image token, and self-attentions are never recorded.

        Args:
            unet_layers: Record the UNet's cross-attentions to its single image token too: R2G
                only, not informative.
            **options: Those of :class:`TokenLayout`.
        """
        from i2am.layouts.stableviton import warp_blocks

        return warp_blocks(unet_layers=unet_layers, **options)

    @staticmethod
    def ip_adapter(grid: Grid | None = None, prefix: int = 0, **options: Any) -> "TokenLayout":
        """The image branch of IP-Adapter cross-attention.

        Args:
            grid: Patch grid of the Full variants (then usually ``(16, 16)`` with ``prefix=1``);
                ``None`` for the base, Plus and FaceID variants, whose tokens have no place.
            prefix: Tokens before the patches of each image.
            **options: ``adapter`` and ``image`` (0-based) choose among several; and those of
                :class:`TokenLayout`.

        Raises:
            ValueError: The grid is empty, a number negative, or ``prefix`` or ``image`` is given
                without a grid, so that nobody knows where images end.
        """
        from i2am.layouts.ip_adapter import image_branch

        return image_branch(grid, prefix, **options)
