"""Attention shapes of the paper's systems at their published sizes, one conditional sample.

From their architectures: SD 1.5 levels of 64 x 48, 32 x 24, 16 x 12 and 8 x 6 tokens at 512 x 384,
of 64 x 64 to 8 x 8 at 512 x 512; 8 heads.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionShape:
    """One kind of recorded call, and how many of it a denoiser evaluation makes."""

    system: str
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    calls: int
    heads: int = 8

    def __str__(self) -> str:
        return f"{self.system}-{self.seqlen_q}x{self.seqlen_k}x{self.head_dim}"


CUSTOM = (
    AttentionShape("custom", 3072, 1037, 40, 5),
    AttentionShape("custom", 768, 1037, 80, 5),
    AttentionShape("custom", 192, 1037, 160, 5),
    AttentionShape("custom", 48, 1037, 160, 1),
)
"""DINOv2 tokens as context: 37 x 28 patches and CLS, all 16 cross-attentions."""

WARP = (
    AttentionShape("warp", 192, 192, 160, 3),
    AttentionShape("warp", 768, 768, 160, 1),
    AttentionShape("warp", 768, 768, 80, 2),
    AttentionShape("warp", 3072, 3072, 80, 1),
    AttentionShape("warp", 3072, 3072, 40, 2),
)
"""StableVITON's nine warp blocks: keys on the query's own grid."""

SINGLE_TOKEN = (
    AttentionShape("single", 4096, 1, 40, 5),
    AttentionShape("single", 1024, 1, 80, 5),
    AttentionShape("single", 256, 1, 160, 5),
    AttentionShape("single", 64, 1, 160, 1),
)
"""Paint-by-Example and DCI-VTON at 512 x 512: one CLIP token, all 16 cross-attentions."""
