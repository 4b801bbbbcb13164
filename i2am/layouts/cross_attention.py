"""UNet cross-attention: queries on the level's grid, keys made of the reference alone."""

from typing import Any

from torch import nn

from i2am.attribution.grid import Grid
from i2am.layouts.spans import Sequences, Span, in_order
from i2am.layouts.token_layout import AttentionCall, Frame, TokenLayout


def unet_layers(name: str) -> str:
    """The attention modules of a UNet that have a name, and none of what else it may contain."""
    where = r"^((down|up)_blocks\.\d+|mid_block)\.attentions\.\d+\.transformer_blocks\.\d+"
    return rf"{where}\.{name}$"


def generated_tokens(call: AttentionCall, frame: Frame) -> tuple[Span, ...] | None:
    """All queries, on the grid of the UNet level that has that many tokens."""
    grid = frame.level_grid(call.seqlen_q, call.layer)
    return None if grid is None else (Span("generated", "generated", 0, grid),)


def check_numbers(grid: Grid | None, **counts: int) -> None:
    """Refuse what no sequence of tokens can have.

    Raises:
        ValueError: The grid is empty, or a count is negative.
    """
    if grid is not None and min(grid) < 1:
        raise ValueError(f"grid must be at least 1x1, got {grid[0]}x{grid[1]}")
    for name, count in counts.items():
        if count < 0:
            raise ValueError(f"{name} must be at least 0, got {count}")


def patch_tokens(grid: Grid, prefix: int, **options: Any) -> TokenLayout:
    """See :meth:`TokenLayout.cross_attention`."""
    check_numbers(grid, prefix=prefix)
    expected = prefix + grid[0] * grid[1]

    def spans(call: AttentionCall, frame: Frame) -> Sequences | None:
        if call.seqlen_k != expected:
            raise ValueError(
                f"layout expects {prefix} + {grid[0]}x{grid[1]} = {expected} reference tokens, "
                f"got {call.seqlen_k} keys in {call.layer}"
            )
        generated = generated_tokens(call, frame)
        key = in_order(("prefix", "other", (prefix,)), ("reference", "reference", grid))
        return None if generated is None else Sequences(generated, key)

    return TokenLayout(f"cross_attention {grid[0]}x{grid[1]}", spans, **options)


def single_token(**options: Any) -> TokenLayout:
    """See :meth:`TokenLayout.single_token`."""

    def spans(call: AttentionCall, frame: Frame) -> Sequences | None:
        if call.seqlen_k != 1:
            raise ValueError(
                f"layout expects a single reference token, got {call.seqlen_k} keys in {call.layer}"
            )
        generated = generated_tokens(call, frame)
        key = (Span("reference", "reference", 0, (1,)),)
        return None if generated is None else Sequences(generated, key)

    return TokenLayout("single_token", spans, **options)


def paint_by_example(pipe: Any, denoiser: nn.Module) -> TokenLayout:
    """Paint-by-Example, as :func:`known_layout` asks for it."""
    return single_token()


def same_grid(layers: str, **options: Any) -> TokenLayout:
    """See :meth:`TokenLayout.same_grid`."""

    def spans(call: AttentionCall, frame: Frame) -> Sequences | None:
        if call.seqlen_k != call.seqlen_q:
            raise ValueError(
                f"layout expects as many keys as queries, got {call.seqlen_k} and "
                f"{call.seqlen_q} in {call.layer}"
            )
        generated = generated_tokens(call, frame)
        if generated is None:
            return None
        key = (Span("reference", "reference", 0, generated[0].grid),)
        return Sequences(generated, key)

    return TokenLayout("same_grid", spans, layers=layers, **options)
