"""IP-Adapter: a second attention over image tokens beside the one over the text."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

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

    def spans(call: AttentionCall, frame: Frame) -> Sequences | None:
        if call.call_index != 1 + adapter:
            return None
        generated = generated_tokens(call, frame)
        if generated is None:
            return None
        if grid is None:
            return Sequences(generated, (Span("reference", "reference", 0, (call.seqlen_k,)),))
        patches = grid[0] * grid[1]
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


def known(pipe: Any, denoiser: nn.Module) -> TokenLayout | None:
    """The images of all adapters of a UNet, each a reference; ``None`` where none is loaded.

    What the first call of a layer attends to is not known here.

    Raises:
        ValueError: The patches of an adapter are those of an image encoder that is not there.
    """
    adapters = getattr(denoiser, "encoder_hid_proj", None)
    grids = [
        _patches(pipe, projection)
        for projection in getattr(adapters, "image_projection_layers", None) or ()
    ]
    if not grids:
        return None

    def spans(call: AttentionCall, frame: Frame) -> Sequences | None:
        generated = generated_tokens(call, frame)
        calls = _calls(frame)
        # without masks there are fewer calls than with
        if generated is None or not 1 <= call.call_index <= len(calls):
            return None
        adapter, images = calls[call.call_index - 1]
        names = _names(frame)[adapter]
        return Sequences(generated, _keys(call, [names[i] for i in images], grids[adapter]))

    where = " and ".join("tokens" if grid is None else f"{grid[0]}x{grid[1]}" for grid in grids)
    return TokenLayout(f"ip_adapter {where}", spans, context_keys=True, through_processor=True)


def _patches(pipe: Any, projection: nn.Module) -> Grid | None:
    # only this variant keeps the patches of its encoder apart
    if type(projection).__name__ != "IPAdapterFullImageProjection":
        return None
    encoder = getattr(pipe, "image_encoder", None)
    if encoder is None:
        raise ValueError(
            f"layout must be given for {type(pipe).__name__}, whose IP-Adapter reads the patches "
            "of an image encoder that is not there, so that their grid is not known; for instance "
            "layout=TokenLayout.ip_adapter(grid=(16, 16), prefix=1) for patches of CLIP ViT-H/14"
        )
    side = encoder.config.image_size // encoder.config.patch_size
    return side, side


def _counts(frame: Frame) -> list[int]:
    """How many images each adapter was given."""
    embeds = frame.arguments["added_cond_kwargs"]["image_embeds"]
    return [1] if isinstance(embeds, Tensor) else [each.shape[1] for each in embeds]


def _names(frame: Frame) -> list[list[str]]:
    counts = _counts(frame)
    if sum(counts) == 1:
        return [["reference"] * count for count in counts]
    numbers = iter(range(1, sum(counts) + 1))
    return [[f"reference {next(numbers)}" for _ in range(count)] for count in counts]


def _calls(frame: Frame) -> list[tuple[int, range]]:
    """The calls behind that of the text: whose they are, and of which of its images."""
    counts = _counts(frame)
    masks = (frame.arguments.get("cross_attention_kwargs") or {}).get("ip_adapter_masks")
    calls = []
    for adapter, count in enumerate(counts):
        if masks is None or masks[adapter] is None:
            calls.append((adapter, range(count)))
        else:
            calls += [(adapter, range(image, image + 1)) for image in range(count)]
    return calls


def _keys(call: AttentionCall, names: Sequence[str], grid: Grid | None) -> tuple[Span, ...]:
    tokens, rest = divmod(call.seqlen_k, len(names))
    if rest or (grid is not None and tokens != 1 + grid[0] * grid[1]):
        each = "equally many tokens" if grid is None else f"1 + {grid[0]}x{grid[1]} tokens"
        raise ValueError(
            f"layout expects {each} for each image, got {call.seqlen_k} keys for {len(names)} in "
            f"{call.layer}"
        )
    own: tuple[int, ...] = (tokens,) if grid is None else grid
    prefix = 0 if grid is None else 1
    return tuple(
        Span(name, "reference", number * tokens + prefix, own) for number, name in enumerate(names)
    )
