"""Attention shapes of real denoisers, one conditional sample each, in groups by what they need.

SD 1.5 at 512 x 384 has levels of 64 x 48, 32 x 24, 16 x 12 and 8 x 6 tokens and 8 heads; at
1024 x 768 each side has twice as many. SDXL attends on two levels only, with heads of 64 features.
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

LARGE = (
    AttentionShape("custom", 12288, 1037, 40, 5),
    AttentionShape("custom", 12288, 4145, 40, 5),
    AttentionShape("custom", 3072, 4145, 80, 5),
    AttentionShape("custom", 768, 4145, 160, 5),
    AttentionShape("custom", 192, 4145, 160, 1),
    AttentionShape("warp", 12288, 12288, 80, 1),
    AttentionShape("warp", 12288, 12288, 40, 2),
    AttentionShape("single", 12288, 1, 40, 5),
)
"""1024 x 768; 4145 keys are 74 x 56 patches of a reference of twice the size, and CLS."""

SDXL = (
    AttentionShape("sdxl", 3072, 1037, 64, 10, heads=10),
    AttentionShape("sdxl", 768, 1037, 64, 60, heads=20),
)
"""SDXL at 1024 x 768 with the custom model's tokens as context, all 70 cross-attentions."""

DIT = (
    AttentionShape("dit", 4608, 4608, 128, 57, heads=24),
    AttentionShape("dit", 8704, 8704, 128, 57, heads=24),
)
"""Joint attention of a Flux-size transformer: 512 text tokens and 4096 of one or two images."""

GPU = (*CUSTOM[:3], SDXL[0], WARP[4], WARP[3], DIT[0])
"""The costly calls of each model, for a GPU at hand for minutes."""

TINY = (
    AttentionShape("tiny", 24, 13, 8, 1, heads=2),
    AttentionShape("tiny", 12, 1, 8, 1, heads=2),
)
"""For the tests of the benchmarks."""

GROUPS = {
    "512x384": CUSTOM + WARP + SINGLE_TOKEN,
    "1024x768": LARGE,
    "sdxl": SDXL,
    "dit": DIT,
    "gpu": GPU,
    "tiny": TINY,
}
DEFAULT_GROUPS = {"cpu": ("512x384",), "cuda": ("512x384", "1024x768", "sdxl", "dit")}
