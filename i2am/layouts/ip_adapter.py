"""IP-Adapter: a second attention over image tokens beside the one over the text."""

from typing import Any

from i2am.attribution.grid import Grid
from i2am.layouts.cross_attention import check_numbers, generated_tokens
from i2am.layouts.spans import Sequences, Span
from i2am.layouts.token_layout import AttentionCall, Frame, TokenLayout


def image_branch(
    grid: Grid | None, prefix: int, *, adapter: int = 0, image: int = 0, **options: Any
) -> TokenLayout:
    """See :meth:`TokenLayout.ip_adapter`.

    The text is attention call 0 of a layer; the branches of the adapters follow in order. Several
    images of one adapter lie one after the other in its keys (with masks they are calls of their
    own: choose them by ``adapter``, counting calls).
    """
    check_numbers(grid, prefix=prefix, adapter=adapter, image=image)
    if grid is None and (prefix or image):
        raise ValueError(f"prefix and image need a grid, got prefix={prefix}, image={image}")
    patches = None if grid is None else grid[0] * grid[1]

    def spans(call: AttentionCall, frame: Frame) -> Sequences | None:
        if call.call_index != 1 + adapter:
            return None
        generated = generated_tokens(call, frame)
        if generated is None:
            return None
        if grid is None or patches is None:
            return Sequences(generated, (Span("reference", "reference", 0, (call.seqlen_k,)),))
        start = image * (prefix + patches) + prefix
        if start + patches > call.seqlen_k or call.seqlen_k % (prefix + patches):
            raise ValueError(
                f"layout expects images of {prefix} + {patches} tokens and image {image} among "
                f"them, got {call.seqlen_k} keys in {call.layer}"
            )
        return Sequences(generated, (Span("reference", "reference", start, grid),))

    where = "tokens" if grid is None else f"{grid[0]}x{grid[1]}"
    defaults = {"context_keys": True, "through_processor": True}
    return TokenLayout(f"ip_adapter {where}", spans, **{**defaults, **options})
