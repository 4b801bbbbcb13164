"""The least time that each shape can take on an H100, from what it computes and what it moves.

    python benchmarks/roofline.py

Per attention call, three limits: bytes over memory bandwidth, matrix products over the tensor
cores, exponentials over the special function units. The largest is the floor; no kernel is faster,
and a share of the roofline is floor / measured time.
"""

from dataclasses import dataclass

from shapes import GROUPS, AttentionShape

BANDWIDTH = 3.0e12  # bytes / s, read and written, measured
MATRIX = 782e12  # bf16 operations / s, measured
EXPONENTIALS = 16 * 132 * 1.98e9  # per clock and multiprocessor, multiprocessors, boost clock
ITEM = 2  # bytes of a bf16 number
FEATURES = 16  # a matrix instruction takes 16 features at a time
ONE_TILE = 128  # keys that one tile holds: the sweep of the columns has whole rows too


@dataclass(frozen=True)
class Work:
    """What a call has to do at least: operations of matrix products, exponentials, bytes moved."""

    matrix: float
    exponentials: float
    bytes: float

    def limits(self) -> dict[str, float]:
        """Seconds that each resource needs for it."""
        return {
            "bytes": self.bytes / BANDWIDTH,
            "matrix": self.matrix / MATRIX,
            "exponentials": self.exponentials / EXPONENTIALS,
        }

    @property
    def floor(self) -> float:
        """Seconds."""
        return max(self.limits().values())

    @property
    def bound(self) -> str:
        """The resource that decides."""
        limits = self.limits()
        return max(limits, key=limits.__getitem__)


def attention(shape: AttentionShape, batch: int) -> Work:
    """The un-recorded call: two products, one exponential per score."""
    scores = _scores(shape, batch)
    tokens = batch * shape.heads * shape.head_dim * ITEM
    return Work(
        matrix=2 * 2 * scores * _features(shape),
        exponentials=scores,
        bytes=tokens * 2 * (shape.seqlen_q + shape.seqlen_k),
    )


def recording(shape: AttentionShape, batch: int, *, lse_known: bool = True) -> Work:
    """Both directions beside it: two passes over QK^T, a third where no log-sum-exp is handed over.

    One sweep yields the column normalisers and ``W P`` with one exponential, the other ``C u``. Few
    keys need no third: the first sweep sees whole rows.
    """
    passes = 2 if lse_known or shape.seqlen_k <= ONE_TILE else 3
    scores = _scores(shape, batch)
    tokens = batch * shape.heads * (shape.seqlen_q + shape.seqlen_k)
    accumulators = 4 * tokens * 4  # read and written, and two log-sum-exps
    return Work(
        matrix=passes * 2 * scores * _features(shape),
        exponentials=passes * scores,
        bytes=tokens * shape.head_dim * ITEM + accumulators,
    )


def table(batch: int = 8) -> str:
    """Markdown: floors of attention and of recording beside it, and what decides them."""
    lines = [
        f"| shape, batch {batch} | GFLOP | exponentials | MB | attention | recording | bound by |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    shapes = [
        shape for name, group in GROUPS.items() if name not in ("gpu", "tiny") for shape in group
    ]
    for shape in shapes:
        plain, ours = attention(shape, batch), recording(shape, batch)
        lines.append(
            f"| {shape} | {ours.matrix / 1e9:.1f} | {ours.exponentials / 1e6:.0f} M | "
            f"{ours.bytes / 1e6:.1f} | {plain.floor * 1e6:.0f} us | {ours.floor * 1e6:.0f} us | "
            f"{ours.bound} |"
        )
    return "\n".join(lines)


def _scores(shape: AttentionShape, batch: int) -> float:
    return float(batch * shape.heads * shape.seqlen_q * shape.seqlen_k)


def _features(shape: AttentionShape) -> int:
    return -(-shape.head_dim // FEATURES) * FEATURES


if __name__ == "__main__":
    print(table())
