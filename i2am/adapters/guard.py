"""Errors of a recording end the recording, not the run that it records."""

import functools
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Self

UNGUARDED: AbstractContextManager[Any] = nullcontext()
"""Lets everything pass."""


class Guard:
    """Keeps what fails in the recording away from the run: ``with guard:`` swallows and reports.

    Everything of ours that the user's pipeline calls is inside one, but for what is compiled into
    the model's own graph. ``KeyboardInterrupt`` and its kind, and whatever the model itself raises,
    pass.

    Args:
        on_failure: Told the exception. Its traceback is a note: frames would hold their tensors,
            and those of the callers, as long as the exception is kept.
    """

    def __init__(self, on_failure: Callable[[Exception], None]) -> None:
        self._on_failure = on_failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        frames: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        error.add_note("".join(traceback.format_exception(error)))
        chained: BaseException | None = error
        while chained is not None:
            chained.__traceback__ = None
            chained = chained.__cause__ or chained.__context__
        self._on_failure(error)
        return True

    def around(self, function: Callable[..., None]) -> Callable[..., None]:
        """The function inside the guard."""

        @functools.wraps(function)
        def guarded(*args: Any) -> None:
            with self:
                function(*args)

        return guarded
