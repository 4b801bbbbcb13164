"""The ``i2am`` command: its subcommands, signals, messages and exit codes.

Results go to stdout, everything else to stderr. Nothing heavy is imported before a subcommand runs.
"""

import errno
import logging
import signal
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import click
from click.exceptions import NoArgsIsHelpError

import i2am
from i2am.cli.convert import convert
from i2am.cli.demo import demo
from i2am.cli.errors import CommandError, ExitCode, Terminated
from i2am.cli.evaluate import evaluate
from i2am.cli.export import export
from i2am.cli.figure import figure
from i2am.cli.output import LineFormatter, echo, one_line
from i2am.cli.record import record
from i2am.cli.report import report
from i2am.cli.score import score
from i2am.cli.status import status
from i2am.cli.train import train
from i2am.cli.verify import verify
from i2am.evaluation.errors import out_of_memory
from i2am.files import OutputRefused

log = logging.getLogger("i2am")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(i2am.__version__, prog_name="i2am")
def app() -> None:
    """Record which parts of a reference image a diffusion model used, and where."""


_COMMANDS = (
    record,
    demo,
    report,
    figure,
    evaluate,
    status,
    score,
    verify,
    export,
    train,
    convert,
)
for command in _COMMANDS:
    app.add_command(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        The exit code, one of `ExitCode`. Errors were written to stderr, one sentence each.
    """
    with _messages(), _stop_signals():
        try:
            code = app.main(argv, prog_name="i2am", standalone_mode=False)
            return code if isinstance(code, int) else ExitCode.DONE
        except NoArgsIsHelpError as error:
            # its message is the whole help
            echo(*error.format_message().splitlines(), err=True)
            return ExitCode.USAGE
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "i2am"
            return _fail(ExitCode.USAGE, f"{error.format_message()} See '{command} --help'.")
        except (KeyboardInterrupt, click.Abort):
            return _fail(ExitCode.INTERRUPTED, "interrupted; nothing was written")
        except Terminated:
            return _fail(ExitCode.TERMINATED, "terminated; nothing was written")
        except CommandError as error:
            return _fail(error.code, str(error))
        except OutputRefused as error:
            return _fail(ExitCode.CONFLICT, str(error))
        except OSError as error:
            # no disk takes such a name
            named = error.errno == errno.ENAMETOOLONG
            return _fail(ExitCode.REJECTED if named else ExitCode.IO, str(error))
        except Exception as error:
            if out_of_memory(error):
                return _fail(
                    ExitCode.REJECTED,
                    "out of memory; ask for fewer regions or time groups, or a smaller --size",
                )
            return _fail(ExitCode.UNEXPECTED, f"unexpected {type(error).__name__}: {error}")


def _fail(code: ExitCode, message: str) -> int:
    if log.isEnabledFor(logging.DEBUG) and code != ExitCode.USAGE:
        # indented: a line break in a name begins no line of ours
        echo(*(f"  {line}" for line in traceback.format_exc().splitlines()), err=True)
    echo(f"error: {one_line(message)}", err=True)
    return code


@contextmanager
def _messages() -> Iterator[None]:
    """Our log and Python's warnings as plain lines on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter())
    handler.addFilter(_Once())
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: log.warning("%s", message)
            yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


class _Once(logging.Filter):
    """Lets a warning of one text through once, however many images repeat it."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        text = record.getMessage()
        new = text not in self._said
        self._said.add(text)
        return new


@contextmanager
def _stop_signals() -> Iterator[None]:
    """SIGINT and SIGTERM unwind the stack once, so that partial results are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        # the second one kills at once
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
