"""Token layouts: what the tokens of an attention call stand for, one small file per family."""

from i2am.layouts.token_layout import AttentionCall, Frame, TokenLayout, Tokens

__all__ = ["AttentionCall", "Frame", "TokenLayout", "Tokens"]
