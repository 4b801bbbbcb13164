"""Losses and metrics of a training as JSON lines."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from i2am.files import append, make_folder, parse_json, read_bytes, write


class Journal:
    """A file of JSON lines, each with its step.

    Args:
        path: The file. Lines of steps behind `start`, which will be made again, are dropped.
        start: Step after which the training goes on.
    """

    def __init__(self, path: Path, start: int) -> None:
        make_folder(path.parent)
        kept = []
        if path.exists():
            for line in read_bytes(path).splitlines():
                # the last line of a killed run may be half a line
                with suppress(ValueError, KeyError, TypeError):
                    if parse_json(line, str(path))["step"] <= start:
                        kept.append(line + b"\n")
        write(path, kept)
        self.path = path

    def write(self, values: Mapping[str, float]) -> None:
        """Appends one line; what is not finite is null in it."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        append(self.path, json.dumps(finite) + "\n")
