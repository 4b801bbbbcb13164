"""The one table of tile shapes: shape class -> configuration, each with its reason.

The choice depends on dtype, head_dim, the owners' sequence length, the number of weight rows and
whether there is a bias, and on nothing else: not on the device, not on the batch. Equal inputs give
equal bits wherever they lie in a batch, and there is no tuning at run time.
"""

from typing import NamedTuple

import torch

MAX_HEAD_DIM = 256
# fp32 weight rows: three TF32 products carry fp32, and AMD's matrix cores multiply fp32 itself
ROW_PRECISION = "ieee" if torch.version.hip else "tf32x3"


class Tile(NamedTuple):
    """How much one program holds: owned tokens, tokens per step, warps, pipeline stages.

    ``maxnreg`` lets ptxas use that many registers per thread where, left alone, it would spill a
    few bytes to fit one more block on a multiprocessor; AMD's compiler has no such option.
    """

    owners: int
    others: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


TILES = {
    # fp32 dots are exact (no TF32) and run on FMA units: operands sit in registers, so head_dim
    # goes in chunks of FP32_CHUNK and nothing is staged ahead
    "statistics, fp32": Tile(64, 32, num_warps=8, num_stages=1, maxnreg=255),
    # 64-bit addresses of a bias tile take two registers each, and the product with many weight rows
    # takes three TF32 dots on fp32 operands: half a tile of scores over twice the warps; also for
    # few rows of short owners and beyond 192 features, which would spill on sm_100 and sm_120, and
    # for shares, whose factors would spill on gfx942
    "statistics, bias or many rows": Tile(64, 32, num_warps=8, num_stages=2, maxnreg=255),
    # 16 x 12 to 32 x 24 grids and image tokens: small tiles, so that 8 heads still fill a GPU
    "statistics, short": Tile(64, 64, num_warps=4, num_stages=3),
    # from 64 x 32 tokens on there are programs enough: fewer reads of the other side; short steps
    # keep two blocks of 8 warps on a multiprocessor (on gfx942 only up to 128 features)
    "statistics, long": Tile(128, 32, num_warps=8, num_stages=3),
    "statistics, long, few rows": Tile(128, 32, num_warps=8, num_stages=3, maxnreg=255),
    # with 128 features three stages spill on sm_86 and sm_120
    "statistics, short, wide": Tile(64, 64, num_warps=4, num_stages=2, maxnreg=255),
    # all keys of a head beside a tile of queries (the owners): as wide as they need, up to this;
    # image tokens: what is read decides, and 64 queries are what matrix instructions take
    "short keys, few": Tile(64, 32, num_warps=4, num_stages=2, maxnreg=255),
    # the statistics of both sides lie in registers beside the scores: twice the warps
    "short keys": Tile(64, 128, num_warps=8, num_stages=2, maxnreg=255),
    # with 256 features and 4 rows 128 keys would spill: beside a bias on sm_80, without on sm_100
    "short keys, wide": Tile(64, 64, num_warps=8, num_stages=2, maxnreg=255),
    # 3 or 4 rows beside 64 keys and over 128 features spill on sm_120: half as many queries
    "short keys, wide, several rows": Tile(32, 64, num_warps=8, num_stages=2, maxnreg=255),
    # fp32 in chunks as above; 8 warps would share gfx942's registers, and a bias spill
    "short keys, fp32": Tile(32, 128, num_warps=4, num_stages=1, maxnreg=255),
    # as for the statistics, and the output has its own accumulators
    "forward, fp32": Tile(32, 32, num_warps=4, num_stages=1, maxnreg=255),
    "forward, bias or very wide": Tile(64, 32, num_warps=8, num_stages=2, maxnreg=255),
    "forward, short": Tile(64, 64, num_warps=4, num_stages=2, maxnreg=255),
    "forward, long": Tile(128, 64, num_warps=8, num_stages=2, maxnreg=255),
    # over 128 output features fill the registers: shorter steps
    "forward, wide": Tile(64, 32, num_warps=4, num_stages=2, maxnreg=255),
}

# queries of few keys come in so many chunks at most: enough for 8 heads to fill a GPU, and one tile
# of partial results holds them all
MAX_CHUNKS = 32
FP32_CHUNK = 16
LONG_OWNERS = 2048
# up to here a weight row is one multiply-add per score and row; beyond, rows are a matrix product
MAX_LOOPED_ROWS = 4
MAX_ROW_BLOCK = 32
MIN_DOT = 16


def width(head_dim: int, together: bool) -> int:
    """The features that a tile is chosen for: where each is read by itself they lie in one block.

    The reason is a fault of ptxas, see ``primitives.py``.
    """
    return head_dim if together else _power_of_2(head_dim)


class StatisticsConfig(NamedTuple):
    """Compile-time arguments of ``statistics.owner_pass``."""

    BLOCK_OWNER: int
    BLOCK_OTHER: int
    BLOCK_D: int
    BLOCK_TAIL: int
    BLOCK_ROWS: int
    BLOCK_GROUPS: int
    num_warps: int
    num_stages: int
    maxnreg: int | None


class ShortConfig(NamedTuple):
    """Arguments of the kernels of ``short.py``; all but ``chunk`` (queries) at compile time."""

    chunk: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    BLOCK_TAIL: int
    num_warps: int
    num_stages: int
    maxnreg: int | None


class ForwardConfig(NamedTuple):
    """Compile-time arguments of ``forward.attention_forward``."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    BLOCK_TAIL: int
    BLOCK_V: int
    BLOCK_V_TAIL: int
    num_warps: int
    num_stages: int
    maxnreg: int | None


def statistics(
    head_dim: int, itemsize: int, owners: int, rows: int, bias: bool, groups: int = 0
) -> StatisticsConfig:
    """Tiles for a pass over ``owners`` tokens with ``rows`` weight rows and ``groups`` shares."""
    block_rows, block_groups = _row_block(rows), _row_block(groups)
    rows += groups
    length = "long" if owners >= LONG_OWNERS and head_dim <= 128 else "short"
    if itemsize == 4:
        tile = TILES["statistics, fp32"]
    elif (
        bias
        or groups
        or rows > MAX_LOOPED_ROWS
        or head_dim > 192
        or (rows > 1 and length == "short")
    ):
        tile = TILES["statistics, bias or many rows"]
    elif length == "short" and 96 < head_dim <= 128:
        tile = TILES["statistics, short, wide"]
    else:
        tile = TILES["statistics, long, few rows" if rows > 1 else f"statistics, {length}"]
    return StatisticsConfig(
        tile.owners,
        tile.others,
        *_score_features(head_dim, itemsize),
        block_rows,
        block_groups,
        tile.num_warps,
        tile.num_stages,
        tile.maxnreg,
    )


def fits_short(head_dim: int, itemsize: int, seqlen_k: int, rows: int) -> bool:
    """Whether one tile holds all keys, and loops the weight rows: the most of both directions."""
    return rows <= MAX_LOOPED_ROWS and seqlen_k <= _short_tile(head_dim, itemsize, seqlen_k).others


def short(head_dim: int, itemsize: int, seqlen_q: int, seqlen_k: int, rows: int) -> ShortConfig:
    """Tiles for ``seqlen_q`` queries beside all of ``seqlen_k`` keys that fit.

    ``rows`` are the weight rows or the votes, whichever are more.
    """
    block_n = max(_power_of_2(seqlen_k), MIN_DOT)
    tile = _short_tile(head_dim, itemsize, block_n)
    several = TILES["short keys, wide, several rows"]
    if rows > 2 and head_dim > 128 and itemsize == 2 and block_n == several.others:
        tile = several
    blocks = -(-seqlen_q // tile.owners)
    return ShortConfig(
        tile.owners * -(-blocks // MAX_CHUNKS),
        tile.owners,
        block_n,
        *_score_features(head_dim, itemsize),
        tile.num_warps,
        tile.num_stages,
        tile.maxnreg,
    )


def forward(head_dim: int, itemsize: int, seqlen_q: int, bias: bool) -> ForwardConfig:
    """Tiles for the attention of ``seqlen_q`` queries."""
    if itemsize == 4:
        tile = TILES["forward, fp32"]
    elif bias or head_dim > 192:
        tile = TILES["forward, bias or very wide"]
    elif head_dim > 128:
        tile = TILES["forward, wide"]
    else:
        tile = TILES["forward, long" if seqlen_q >= LONG_OWNERS else "forward, short"]
    return ForwardConfig(
        tile.owners,
        tile.others,
        *_score_features(head_dim, itemsize),
        *features(head_dim),
        tile.num_warps,
        tile.num_stages,
        tile.maxnreg,
    )


def arguments(config: StatisticsConfig | ShortConfig | ForwardConfig) -> dict[str, int]:
    """The configuration as arguments of a launch on this platform."""
    return {
        name: value
        for name, value in config._asdict().items()
        if name != "maxnreg" or not (value is None or torch.version.hip)
    }


def features(head_dim: int) -> tuple[int, int]:
    """Two blocks, a power of 2 each, that hold ``head_dim`` with the least padding.

    40 is 32 + 16 instead of 64, 72 and 80 are 64 + 16, 160 is 128 + 32; the second may be 0.
    """
    whole = max(_power_of_2(head_dim), MIN_DOT)
    first = whole // 2
    tail = max(_power_of_2(max(head_dim - first, 1)), MIN_DOT)
    return (first, tail) if first >= MIN_DOT and first + tail < whole else (whole, 0)


def _short_tile(head_dim: int, itemsize: int, seqlen_k: int) -> Tile:
    if itemsize == 4:
        return TILES["short keys, fp32"]
    if seqlen_k <= TILES["short keys, few"].others:
        return TILES["short keys, few"]
    return TILES["short keys, wide" if head_dim > 192 else "short keys"]


def _score_features(head_dim: int, itemsize: int) -> tuple[int, int]:
    return (FP32_CHUNK, 0) if itemsize == 4 else features(head_dim)


def _row_block(rows: int) -> int:
    block = _power_of_2(max(rows, 1))
    return block if rows <= MAX_LOOPED_ROWS else min(max(block, MIN_DOT), MAX_ROW_BLOCK)


def _power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()
