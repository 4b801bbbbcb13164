"""The command line: one file per command, which parses, builds and calls."""

from i2am.cli.app import main

__all__ = ["main"]
