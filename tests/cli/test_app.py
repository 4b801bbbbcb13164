"""What surrounds every command: messages, signals, and leaving the process as it was."""

import json
import logging
import signal
import subprocess
import sys
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


def test_a_warning_is_told_once_in_a_command(command, capsys):
    def act():
        for _ in range(2):
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.warn("maps show no cause", stacklevel=1)
            logging.getLogger("i2am").warning("layer %s was left out", "up.0")
            logging.getLogger("i2am").info("recording")

    command(act)
    for _ in range(2):
        assert main(["act"]) == ExitCode.DONE
        assert capsys.readouterr().err.splitlines() == [
            "warning: maps show no cause",
            "warning: layer up.0 was left out",
            "recording",
            "recording",
        ]


IMAGES = [word for name in ("person", "mask", "reference") for word in (f"--{name}", "no.png")]
FIRST = {
    "record": (["pocket", *IMAGES], "loading pocket"),
    "demo": ([], "drawing people and garments, and loading the pocket model"),
    "report": (["a", "b", "-o", "out"], "reading a, b"),
    "figure": (["a", "b", "-o", "out"], "reading a, b"),
    "evaluate": (["pocket", "--data", "a", "-o", "out"], "loading pocket, and the pairs of a"),
    "status": (["a"], "reading a"),
    "score": (["a", "b"], "reading a, b"),
    "verify": (["a"], "reading a"),
    "export": (["a", "--zarr", "out"], "reading a"),
    "train": (["-o", "out"], "preparing to train pocket on paper-doll"),
    "convert": (["a", "--system", "custom", "-o", "out"], "converting a as custom"),
}
# every command in one process, in which nothing that takes seconds to import can be imported
CHILD = """
import contextlib, io, json, sys
HEAVY = {"torch", "numpy", "PIL", "diffusers", "transformers", "accelerate", "matplotlib", "scipy"}

class Heavy:
    def find_spec(self, name, path=None, target=None):
        if name in HEAVY:
            raise SystemExit(name)

sys.meta_path.insert(0, Heavy())
from i2am.cli import main
said = {}
for name, words in json.load(sys.stdin).items():
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            code = main([name, *words])
        except SystemExit as stopped:
            code = stopped.code
    said[name] = err.getvalue(), code
print(json.dumps(said))
"""


def test_every_command_says_something_before_it_imports_what_takes_seconds(tmp_path):
    assert set(FIRST) == set(app.commands)
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD],
        input=json.dumps({name: words for name, (words, _) in FIRST.items()}),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    for name, (said, stopped) in json.loads(done.stdout).items():
        assert said == f"{FIRST[name][1]}\n", name
        assert stopped in ("torch", "numpy", "PIL", "accelerate"), name
    assert not any(tmp_path.iterdir())
