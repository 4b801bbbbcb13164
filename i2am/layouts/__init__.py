"""Token layouts: what the tokens of an attention call stand for, one small file per family."""

from i2am.layouts.reference_unet import appended_features
from i2am.layouts.registry import register_layout
from i2am.layouts.spans import Sequences, Span
from i2am.layouts.spatial import spatial_concatenation
from i2am.layouts.token_layout import AttentionCall, Encoder, Frame, TokenLayout
from i2am.layouts.wan_frames import first_frame, reference_frames

__all__ = [
    "AttentionCall",
    "Encoder",
    "Frame",
    "Sequences",
    "Span",
    "TokenLayout",
    "appended_features",
    "first_frame",
    "reference_frames",
    "register_layout",
    "spatial_concatenation",
]
