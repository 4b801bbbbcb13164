"""What pictures call time groups, heads and layers."""

from collections.abc import Sequence
from itertools import pairwise


def step_titles(groups: int, steps: int | None) -> list[str]:
    """What to call each time group: the steps it sums, counted from 1, or its number.

    Raises:
        ValueError: There are fewer steps than groups.
    """
    if steps is None or groups == 0:
        return [f"time group {group + 1}" for group in range(groups)]
    if steps < groups:
        raise ValueError(f"steps must be at least the {groups} time groups, got {steps}")
    # the recorder sends step s to group s * groups // steps
    edges = [-(-group * steps // groups) for group in range(groups + 1)]
    return [
        f"step {first + 1}" if first + 1 == last else f"steps {first + 1} to {last}"
        for first, last in pairwise(edges)
    ]


def head_titles(count: int) -> list[str]:
    """What to call each head."""
    return [f"head {head}" for head in range(count)]


def layer_titles(names: Sequence[str]) -> list[str]:
    """Paths of layers without the parts that all of them end with."""
    parts = [name.split(".") for name in names]
    while len(parts) > 1 and all(len(one) > 1 and one[-1] == parts[0][-1] for one in parts):
        parts = [one[:-1] for one in parts]
    return [".".join(one) for one in parts]
