"""Wan 2.1 and 2.2: tokens of a video that attend to a text and, in Wan 2.1, to an image."""

from typing import Any

from torch import nn

from i2am.attribution.grid import Grid
from i2am.layouts.registry import Make
from i2am.layouts.spans import Role, Sequences, in_order
from i2am.layouts.token_layout import AttentionCall, Encoder, Frame, TokenLayout

FRAMES = "latent frame 0 is frame 0 of the video, latent frame f its frames 4f - 3 to 4f"
NOTE = f"{FRAMES}; the text is padded to 512 tokens, and the padding is attended to like any word"
# image encoders of the published models by their width: CLIP ViT-H/14
_PATCHES = {1280: (16, 16)}


def video_grid(call: AttentionCall, frame: Frame) -> tuple[int, ...]:
    """Frames, height and width of the tokens of the video, which are all queries.

    Raises:
        ValueError: There are more or fewer queries.
    """
    latents, patch = frame.arguments["hidden_states"].shape[-3:], frame.config["patch_size"]
    grid = tuple(side // step for side, step in zip(latents, patch, strict=True))
    if grid[0] * grid[1] * grid[2] != call.seqlen_q:
        raise ValueError(
            f"layout expects {grid[0]}x{grid[1]}x{grid[2]} tokens of the video, got "
            f"{call.seqlen_q} queries in {call.layer}"
        )
    return grid


def cross_attention(patches: Grid | None = None, **options: Any) -> TokenLayout:
    """Keys are the image's where the model has a call for them, which is the first, else a text's.

    Args:
        patches: Grid of the image encoder's patches, behind a class token; ``None`` where it is not
            known. Of two images that of the first frame comes first.
        **options: Those of :class:`TokenLayout`.
    """

    def spans(call: AttentionCall, frame: Frame) -> Sequences | None:
        query = in_order(("generated", "generated", video_grid(call, frame)))
        if frame.config.get("added_kv_proj_dim") is None or call.call_index:
            return Sequences(query, in_order(("text", "text", (call.seqlen_k,))))
        # models for a first and a last frame have embeddings that tell them apart
        count = 1 if frame.config.get("pos_embed_seq_len") is None else 2
        tokens, rest = divmod(call.seqlen_k, count)
        if rest or (patches is not None and tokens != 1 + patches[0] * patches[1]):
            each = "equally many" if patches is None else f"1 + {patches[0]}x{patches[1]}"
            raise ValueError(
                f"layout expects {each} tokens for each of {count} images, got {call.seqlen_k} "
                f"keys in {call.layer}"
            )
        parts: list[tuple[str, Role, tuple[int, ...]]] = []
        for number in range(1, count + 1):
            name = "reference" if count == 1 else f"reference {number}"
            if patches is None:
                parts.append((name, "reference", (tokens,)))
            else:
                parts += [("prefix", "other", (1,)), (name, "reference", patches)]
        return Sequences(query, in_order(*parts))

    defaults = {"layers": r"^blocks\.\d+\.attn2$", "note": NOTE, "sums": "resized"}
    return TokenLayout("wan", spans, **{**defaults, **options})


def _patches(pipe: Any, config: Any) -> Grid | None:
    encoder = getattr(pipe, "image_encoder", None)
    if encoder is None:
        return _PATCHES.get(config.image_dim)
    side = encoder.config.image_size // encoder.config.patch_size
    return side, side


def _layout_of(why: str) -> Make:
    """The text, and the image where the model reads one; else `why` there is none."""

    def make(pipe: Any, denoiser: Any) -> TokenLayout:
        encoders = (Encoder(),) if getattr(pipe, "text_encoder", None) is not None else ()
        if denoiser.config.added_kv_proj_dim is not None:
            return cross_attention(_patches(pipe, denoiser.config), encoders=encoders)
        return cross_attention(encoders=encoders, no_reference=f"{type(pipe).__name__} {why}")

    return make


text_to_video = _layout_of("has no reference image")
transformer = _layout_of("has no reference tokens: it has no cross-attention to an image")
video_to_video = _layout_of(
    "has no reference tokens: its video is what the run starts from, or enters as input channels, "
    "which attention does not see apart from the generated video"
)
image_to_video = _layout_of(
    "has no reference tokens: its image enters as input channels or as the first latent frame; "
    "layout=i2am.layouts.first_frame() records how later frames attend to the first"
)


def vace(pipe: Any, denoiser: nn.Module) -> TokenLayout | None:
    """Refused: the reference pictures are frames, and their number is not told to the transformer.

    Raises:
        ValueError: Always; it says what to pass.
    """
    raise ValueError(
        f"layout must be given for {type(pipe).__name__}, whose reference pictures are frames in "
        "front of the video that the transformer cannot tell from it; pass "
        "layout=i2am.layouts.reference_frames(number) with their number, or for the words of a "
        "run without any layout=i2am.layouts.wan.cross_attention()"
    )
