"""What surrounds every command: messages, signals, and leaving the process as it was."""

import logging
import signal
import warnings

import click
import pytest

from i2am.cli.app import app, main
from i2am.cli.errors import ExitCode


@pytest.fixture
def command(monkeypatch):
    """Adds a command `act` that runs a function."""

    def add(function):
        monkeypatch.setitem(app.commands, "act", click.command("act")(function))

    return add


def test_warnings_and_log_are_plain_lines_on_stderr(command, capsys):
    def act():
        warnings.warn("maps show no cause", stacklevel=1)
        logging.getLogger("i2am.adapters").warning("layers were left out")
        logging.getLogger("i2am").info("recording")
        click.echo("result")

    command(act)
    assert main(["act"]) == ExitCode.DONE
    out, err = capsys.readouterr()
    assert out == "result\n"
    assert err.splitlines() == [
        "warning: maps show no cause",
        "warning: layers were left out",
        "recording",
    ]


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, ExitCode.TERMINATED)],
    ids=["SIGINT", "SIGTERM"],
)
def test_first_signal_unwinds_and_the_second_would_kill(command, number, code):
    seen = []

    def act():
        try:
            signal.raise_signal(number)
        except Exception:
            seen.append("swallowed")
        finally:
            seen.append(signal.getsignal(number))

    command(act)
    assert main(["act"]) == code
    assert seen == [signal.SIG_DFL]


def test_everything_is_put_back(command):
    log = logging.getLogger("i2am")

    def state():
        return (
            list(log.handlers),
            log.level,
            log.propagate,
            warnings.showwarning,
            signal.getsignal(signal.SIGINT),
            signal.getsignal(signal.SIGTERM),
        )

    def act():
        log.setLevel(logging.DEBUG)
        raise ValueError("no")

    command(act)
    before = state()
    assert main(["act"]) == ExitCode.UNEXPECTED
    assert state() == before


def test_message_is_one_line_whatever_the_error_says(command, capsys):
    def act():
        raise OSError("disk\n  on fire")

    command(act)
    assert main(["act"]) == ExitCode.IO
    assert capsys.readouterr().err == "error: disk on fire\n"
