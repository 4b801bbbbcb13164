"""The files of scores: whole or unchanged whatever the disk does, and readable by others."""

import csv
import errno
import io
import json
import os
import zlib

import numpy as np
import pytest

from i2am.evaluation.scores import results
from i2am.evaluation.scores.results import samples_csv, write_results
from i2am.evaluation.scores.scoring import Scoring, score_run
from i2am.evaluation.scores.summary import to_json
from i2am.evaluation.scores.testing import make_run, tiny_features

SCORING = Scoring(metrics=("imacs", "ssim", "fid", "kid"), replicates=20)


@pytest.fixture
def run(tmp_path):
    return make_run(
        tmp_path / "run", tmp_path / "data", commit=[0, 1], failed=0, undefined=1, shard=2
    )


@pytest.fixture
def scores(run):
    return score_run(run, SCORING, features=tiny_features())


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_the_table_has_one_row_per_sample_and_setting(run, scores):
    rows = rows_of(samples_csv(scores.samples))
    planned = [
        (setting, str(place), *map(str, pair[:3]))
        for setting in run.settings()
        for place, pair in enumerate(run.plan["data"]["pairs"][setting])
    ]
    columns = ("setting", "index", "id", "person", "garment")
    assert [tuple(row[name] for name in columns) for row in rows] == planned
    assert [row["status"] for row in rows] == ["failed", *["ok"] * 3, *["missing"] * 2] * 2


def test_numbers_in_the_table_have_all_their_digits(scores):
    rows = rows_of(samples_csv(scores.samples))
    for setting, samples in scores.samples.items():
        mine = [row for row in rows if row["setting"] == setting]
        for name, column in samples.scores.items():
            found = np.array([float(row[name]) if row[name] else np.nan for row in mine])
            np.testing.assert_array_equal(found, column)


def test_the_table_says_why_a_number_is_missing(scores):
    failed, undefined, whole, *_ = rows_of(samples_csv(scores.samples))
    assert failed["reason"] == "sample: nonfinite_map: NaN in layer up.0"
    assert failed["imacs_g"] == failed["ssim"] == ""
    assert undefined["reason"] == "imacs_r: degenerate_map: its map is the same everywhere"
    assert undefined["imacs_r"] == ""
    assert undefined["imacs_g"] != ""
    assert whole["reason"] == ""


def test_metrics_json_is_strict_and_names_its_table(run, scores):
    write_results(run.folder, scores)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = (run.folder / "results" / "metrics.json").read_text(encoding="utf-8")
    document = json.loads(text, parse_constant=refuse)
    table = (run.folder / "results" / "scores.csv").read_bytes()
    assert document.pop("files") == {"scores.csv": {"crc32": zlib.crc32(table)}}
    assert document == json.loads(to_json(scores.document))


def test_a_number_that_is_none_cannot_be_written(run, scores):
    scores.document["settings"]["paired"]["metrics"]["imacs_g"]["value"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results(run.folder, scores)
    assert not (run.folder / "results").exists()


def test_equal_scores_give_equal_bytes(run, scores, tmp_path):
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_results(tmp_path / name, scores)
        folder = tmp_path / name / "results"
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"scores.csv", "metrics.json"}


# The disk

OLD, NEW = {"a": b"old a", "b": b"old b"}, {"a": b"new a", "b": b"new b"}


def read(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Fault:
    """Calls of a function until the n-th, which fails."""

    def __init__(self, at, function, fail):
        self.count, self._at, self._function, self._fail = 0, at, function, fail

    def __call__(self, *arguments, **options):
        self.count += 1
        if self.count == self._at:
            self._fail()
        return self._function(*arguments, **options)


def break_at(monkeypatch, n, operation, fail):
    fault = Fault(n, {"open": open}.get(operation) or getattr(os, operation), fail)
    if operation == "open":
        monkeypatch.setattr(results, "open", fault, raising=False)
    else:
        monkeypatch.setattr(os, operation, fault)
    return fault


def test_a_full_disk_while_writing_keeps_the_old_results(run, scores, monkeypatch):
    write_results(run.folder, scores)
    before = read(run.folder / "results")
    scores.document["model"]["name"] = "another"

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_results(run.folder, scores)
    assert read(run.folder / "results") == before


def test_new_results_follow_the_umask(run, scores):
    before = os.umask(0o027)
    try:
        write_results(run.folder, scores)
    finally:
        os.umask(before)
    for path in (run.folder / "results").iterdir():
        assert path.stat().st_mode & 0o777 == 0o640
