"""Run folders of ``i2am evaluate`` as arguments of other commands."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from i2am.cli.errors import CommandError, ExitCode

if TYPE_CHECKING:
    from i2am.evaluation.store import Store


class RunUnusable(CommandError):
    """A run folder is damaged, or something else than was asked for."""

    code = ExitCode.CONFLICT


@contextmanager
def run_errors() -> Iterator[None]:
    """Gives what can be wrong with a run folder its exit code.

    Raises:
        RunUnusable: In place of `StoreError`.
    """
    from i2am.evaluation.errors import StoreError

    try:
        yield
    except StoreError as error:
        raise RunUnusable(str(error)) from error


@contextmanager
def open_run(folder: Path) -> "Iterator[Store]":
    """A run folder to read; raises `RunUnusable` as `run_errors`."""
    from i2am.evaluation.store import Store

    with run_errors():
        yield Store.open(folder)
