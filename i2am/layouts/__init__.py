"""Token layouts: what the tokens of an attention call stand for, one small file per family."""

from i2am.layouts.spans import Sequences, Span
from i2am.layouts.token_layout import AttentionCall, Encoder, Frame, TokenLayout

__all__ = ["AttentionCall", "Encoder", "Frame", "Sequences", "Span", "TokenLayout"]
