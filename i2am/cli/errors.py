"""How a command ends: exit codes and the exceptions that carry them."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command."""

    DONE = 0
    UNEXPECTED = 1
    """A bug, or a failure nobody foresaw."""
    USAGE = 2
    INCOMPLETE = 3
    """Finished, but part of the result could not be made."""
    REJECTED = 4
    """An input is unusable; nothing was written."""
    CONFLICT = 5
    """The output folder holds something else; it was not touched."""
    IO = 74
    """The disk's own fault: full, read-only, failing."""
    INTERRUPTED = 130
    TERMINATED = 143


class CommandError(Exception):
    """A foreseen failure. The message is one sentence; the class says how the process exits."""

    code = ExitCode.UNEXPECTED


class InputRejected(CommandError):
    """An input cannot be used."""

    code = ExitCode.REJECTED


class Terminated(BaseException):
    """SIGTERM arrived; like KeyboardInterrupt no ``except Exception`` may swallow it."""


class Stopped(CommandError):
    """A signal arrived, and what was done so far stays."""

    def __init__(self, message: str, stop: BaseException) -> None:
        super().__init__(message)
        interrupted = isinstance(stop, KeyboardInterrupt)
        self.code = ExitCode.INTERRUPTED if interrupted else ExitCode.TERMINATED
