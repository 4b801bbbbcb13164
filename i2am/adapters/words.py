"""Stub until the branch is merged."""

from collections.abc import Callable

from torch import Tensor


class PromptWords:
    names: tuple[str, ...] = ()

    def weights(self, span: str, count: int) -> Tensor: ...
    def attach(self) -> Callable[[], None]: ...
    def begin_run(self) -> None: ...
