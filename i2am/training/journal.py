"""Losses and metrics of a training as JSON lines."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from i2am.attribution.storage import write_atomically


class Journal:
    """A file of JSON lines, each with its step.

    Args:
        path: The file. Lines of steps behind `start`, which will be made again, are dropped.
        start: Step after which the training goes on.
    """

    def __init__(self, path: Path, start: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                # the last line of a killed run may be half a line
                with suppress(ValueError, KeyError):
                    if json.loads(line)["step"] <= start:
                        kept.append(line + "\n")
        write_atomically(path, "".join(kept).encode())
        self.path = path

    def write(self, values: Mapping[str, float]) -> None:
        """Appends one line."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(dict(values)) + "\n")
