"""The way to the terminal: whatever a command says goes through here, and obeys `printable`."""

import logging
import sys

import click

from i2am.wording import printable


def echo(*lines: str, err: bool = False) -> None:
    """Print lines that hold no control characters, whatever names they hold.

    Args:
        lines: Texts of one line each; a line break inside is part of a name, and is escaped.
        err: Print on stderr instead of stdout.
    """
    stream = sys.stderr if err else sys.stdout
    text = "\n".join(map(printable, lines))
    # a terminal of another encoding lacks letters
    encoding = getattr(stream, "encoding", None) or "utf-8"
    click.echo(text.encode(encoding, "backslashreplace").decode(encoding), err=err)


def one_line(message: str) -> str:
    """A message that may have several lines, of a library say, as one."""
    return printable(" ".join(message.split()))


class LineFormatter(logging.Formatter):
    """Log records as one line each; warnings and worse begin with their level."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"{record.levelname.lower()}: " if record.levelno != logging.INFO else ""
        return prefix + one_line(record.getMessage())
