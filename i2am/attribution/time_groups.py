"""Sums per time group, of which the current one always lies at the same address."""

from collections.abc import Iterable

import torch
from torch import Tensor

from i2am.wording import counted


def too_many(time_groups: int, steps: int) -> str | None:
    """What to say where more groups are asked for than a run has steps: each step is one then.

    Args:
        time_groups: Groups asked for.
        steps: Denoising steps of the run.

    Returns:
        One sentence, None where there are enough steps.
    """
    if time_groups <= steps:
        return None
    return (
        f"{counted(time_groups, 'time group')} were asked for and the run has "
        f"{counted(steps, 'step')}: its maps have {counted(steps, 'time group')}"
    )


def refuse_capture(like: Tensor) -> None:
    """Called where sums are made: a graph would empty them again whenever it is replayed.

    Raises:
        RuntimeError: A CUDA graph is being captured on the device of ``like``.
    """
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "sums must exist before a CUDA graph is captured, and a layer is recorded into one for "
            "the first time; call the denoiser itself in the first two steps of every run"
        )


class TimeGroups:
    """Which slot of sums ``[samples, slots, ...]`` holds which time group; slot 0 is the current.

    Whoever adds to the sums adds to slot 0 and need not know the group: a captured CUDA graph,
    which knows nothing but addresses, goes on adding to the right one when it is replayed.
    Beginning a group moves sums on the device, without waiting for it.

    Args:
        count: Number of groups, at least 1; the current one is 0.
    """

    def __init__(self, count: int) -> None:
        self._held = list(range(count))

    def __len__(self) -> int:
        return len(self._held)

    @property
    def current(self) -> int:
        """The group in slot 0."""
        return self._held[0]

    @property
    def slots(self) -> list[int]:
        """The slot of every group."""
        return [self._held.index(group) for group in range(len(self._held))]

    def begin(self, group: int, sums: Iterable[Tensor]) -> None:
        """Make another group the current one, in any order, also once more.

        Args:
            group: The group.
            sums: All sums that are kept by these slots, changed in place.

        Raises:
            ValueError: There is no such group.
        """
        if group not in self._held:
            raise ValueError(f"group must be in range({len(self)}), got {group}")
        slot = self._held.index(group)
        if slot == 0:
            return
        for each in sums:
            begun = each[:, slot].clone()
            each[:, slot] = each[:, 0]
            each[:, 0] = begun
        self._held[0], self._held[slot] = self._held[slot], self._held[0]

    def ordered(self, sums: Tensor) -> Tensor:
        """``sums`` ``[samples, time_groups, ...]`` by group; a view where slots are in order."""
        slots = self.slots
        return sums if slots == sorted(slots) else sums[:, slots]

    def copy(self) -> "TimeGroups":
        """The same order, to be changed by itself."""
        copied = TimeGroups(len(self))
        copied._held = list(self._held)
        return copied
