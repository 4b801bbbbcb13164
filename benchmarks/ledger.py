"""Results that outlive the process that measures them: one JSON line each, written as it comes.

A row has the name of its step and its own. It is announced before it is measured and written again
afterwards; the last line counts, so that a row which ended its process says so.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from i2am.files import FileRejected, append, parse_json, read_bytes, write
from i2am.files.atomic import sync

Line = dict[str, Any]

CUT_SHORT = "the process ended before this row did"


class Ledger:
    """The rows in a file, and which of them a run has yet to measure.

    Args:
        path: The file, which need not exist.
        run: Name of the run that writes; rows of others stay.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path = path
        self.run = run
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            # the next row shall not continue one that was cut short
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def rows(self) -> list[Line]:
        """The last line of every row, in the order in which they first came."""
        rows: dict[tuple[str, str], Line] = {}
        for line in self._lines():
            rows[line["step"], line["name"]] = line
        return list(rows.values())

    def settled(self, step: str) -> set[str]:
        """Rows of a step that need no further try in this run: measured, or tried in it."""
        return {
            row["name"]
            for row in self.rows()
            if row["step"] == step
            and (row["run"] == self.run or not ({"error", "left_out"} & row.keys()))
        }

    def announce(self, step: str, name: str) -> None:
        """Say that a row is about to be measured."""
        self.write(step, name, {"error": CUT_SHORT})

    def write(self, step: str, name: str, found: Line) -> None:
        """Append a row and see that it reaches the disk."""
        row = {"step": step, "name": name, "run": self.run, **found}
        line = json.dumps(row, allow_nan=False)
        append(self.path, line + "\n")
        sync(self.path)

    def forget(self, step: str) -> None:
        """Drop the rows of a step."""
        self._replace([row for row in self.rows() if row["step"] != step])

    def compact(self) -> None:
        """Keep the last line of every row only."""
        self._replace(self.rows())

    def _replace(self, rows: list[Line]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write(self.path, text.encode())

    def _lines(self) -> Iterator[Line]:
        if not self.path.exists():
            return
        for line in read_bytes(self.path).splitlines():
            # cut short with its machine, or an empty line
            with suppress(FileRejected):
                yield parse_json(line, str(self.path))
