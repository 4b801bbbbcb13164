"""The files of scores: tables and JSON that replace earlier ones together or not at all."""

import csv
import io
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from i2am.evaluation.scores.samples import MISSING, Samples
from i2am.evaluation.scores.scoring import RunScores
from i2am.evaluation.scores.summary import to_json
from i2am.files import inner_folder, write_together

RESULTS = "results"
"""Their folder in a run."""

_FIRST = ("setting", "index", "id", "person", "garment", "status")


def write_results(run: Path, scores: RunScores) -> None:
    """Write ``results/scores.csv`` and ``results/metrics.json`` of a run.

    Equal scores give equal bytes. The JSON holds the checksum of the table it belongs to.

    Raises:
        OSError: If they cannot be written; earlier ones are as they were then.
    """
    table = samples_csv(scores.samples).encode()
    document = {**scores.document, "files": {"scores.csv": {"crc32": zlib.crc32(table)}}}
    contents = {"scores.csv": table, "metrics.json": f"{to_json(document)}\n".encode()}
    write_together(inner_folder(run, RESULTS), contents)


def samples_csv(samples: Mapping[str, Samples]) -> str:
    """One row per sample and setting; a score that is not there is empty, and ``reason`` says why.

    Numbers have all their digits.
    """
    names = list(dict.fromkeys(name for of in samples.values() for name in of.scores))
    rows = (row for of in samples.values() for row in _rows(of, names))
    return to_csv([*_FIRST, *names, "reason"], rows)


def to_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """CSV with a newline after each row; floats have all their digits, None is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    # a name may hold bytes that are no text
    return text.getvalue().encode(errors="backslashreplace").decode()


def _rows(samples: Samples, names: Sequence[str]) -> Iterable[list[Any]]:
    columns = {name: values.tolist() for name, values in samples.scores.items() if name in {*names}}
    undefined = {name: np.isnan(values) for name, values in samples.scores.items()}
    for position, identity in enumerate(samples.ids):
        status = str(samples.status[position])
        values = [
            None if name not in columns or undefined[name][position] else columns[name][position]
            for name in names
        ]
        known = samples.reasons.get(identity, {}) if status != MISSING else {}
        reason = "; ".join(f"{name}: {known[name].code}: {known[name].message}" for name in known)
        yield [
            samples.setting,
            position,
            identity,
            samples.persons[position],
            samples.garments[position],
            status,
            *values,
            reason,
        ]
