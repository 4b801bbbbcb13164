"""The script for a GPU at hand for minutes: what it leaves, and what a cut or a crash costs."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest
import report
from ledger import CUT_SHORT, Ledger

pytestmark = pytest.mark.slow  # they test no product

BENCHMARKS = Path(gpu.__file__).parent
SHORT = "tests/kernels/test_fused.py -k custom_model"
GUARD = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "rows.jsonl", "2026-11-27 12:00:00 abc")


def test_the_last_line_of_a_row_counts(ledger):
    ledger.announce("calls", "a")
    ledger.write("calls", "a", {"ms": 1})
    ledger.announce("calls", "b")
    rows = {row["name"]: row for row in ledger.rows()}
    assert rows["a"]["ms"] == 1
    assert "error" not in rows["a"]
    assert rows["b"]["error"] == CUT_SHORT
    ledger.compact()
    assert len(ledger.path.read_text().splitlines()) == 2
    assert {row["name"]: row for row in ledger.rows()} == rows


def test_a_later_run_goes_on_with_what_failed(ledger):
    ledger.write("calls", "good", {"ms": 1})
    ledger.write("calls", "bad", {"error": "no"})
    ledger.write("calls", "absent", {"left_out": "no GPU"})
    ledger.announce("calls", "cut")
    assert ledger.settled("calls") == {"good", "bad", "absent", "cut"}
    later = Ledger(ledger.path, "2026-11-27 13:00:00 abd")
    assert later.settled("calls") == {"good"}
    assert later.settled("steps") == set()
    later.forget("calls")
    assert later.settled("calls") == set()


def test_a_line_cut_in_the_middle_costs_only_itself(ledger):
    ledger.write("calls", "a", {"ms": 1})
    with ledger.path.open("a") as file:
        file.write('{"step": "calls", "na')
    assert [row["name"] for row in ledger.rows()] == ["a"]
    later = Ledger(ledger.path, "2026-11-27 13:00:00 abd")
    later.write("calls", "b", {"error": "no"})
    later.write("calls", "c", {"ms": 1})
    assert [row["name"] for row in later.rows()] == ["a", "b", "c"]


CRASH = """
import os, sys
sys.path.insert(0, {benchmarks!r})
from pathlib import Path
from ledger import Ledger
ledger = Ledger(Path({path!r}), {run!r})
for name in "abcd":
    if name not in ledger.settled("calls"):
        ledger.announce("calls", name)
        if name == "b":
            os.abort()
        ledger.write("calls", name, {{"ms": 1}})
"""


def run_with(monkeypatch, ledger, code, seconds=60):
    """Run the step "calls" with ``code`` in place of its process."""
    code = code.format(benchmarks=str(BENCHMARKS), path=str(ledger.path), run=ledger.run)
    monkeypatch.setattr(gpu, "command", lambda *_: [sys.executable, "-c", code])
    options = argparse.Namespace(out=ledger.path.parent, dry_run=True)
    gpu.run("calls", ledger, options, ledger.path.parent, time.monotonic() + seconds)
    return {row["name"]: row for row in ledger.rows()}


def test_a_crash_costs_one_row(monkeypatch, ledger):
    rows = run_with(monkeypatch, ledger, CRASH)
    assert [name for name in "abcd" if "ms" in rows[name]] == ["a", "c", "d"]
    assert rows["b"]["error"] == CUT_SHORT
    assert "error" not in rows[gpu.PROCESS]


def test_a_process_that_cannot_begin_is_a_row(monkeypatch, ledger):
    rows = run_with(monkeypatch, ledger, "raise SystemExit('no such luck')")
    assert rows[gpu.PROCESS]["error"] == "ended with status 1: no such luck"


def test_a_step_is_stopped_in_time(monkeypatch, ledger):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    start = time.monotonic()
    rows = run_with(monkeypatch, ledger, "import time; time.sleep(60)", seconds=1)
    assert time.monotonic() - start < 30
    assert rows[gpu.PROCESS]["error"].startswith("stopped when its time was over")


def test_tests_are_rows_and_a_later_run_leaves_out_what_passed(tmp_path, ledger):
    """One fails, one is skipped: both processes of xdist write to the same rows."""
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('i', range(4))\n"
        "def test_good(i): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_skipped(): pytest.skip('no card')\n"
    )
    (tmp_path / "test_other.py").write_text("import a_package_that_is_not_here\n")

    def outcomes(run):
        later = Ledger(ledger.path, run)
        options = argparse.Namespace(dry_run=True, tests=[".", "-p", "no:cacheprovider"])
        command = gpu.command("tests", later, options, tmp_path)
        ran = subprocess.run(
            command,
            cwd=tmp_path,
            env=gpu.environment(options, tmp_path),
            capture_output=True,
            text=True,
        )
        rows = {row["name"].rpartition("::")[2]: row for row in later.rows()}
        return ran.stdout, rows

    said, rows = outcomes("2026-11-27 12:00:00 abc")
    assert "1 failed, 4 passed, 1 skipped" in said
    assert len(rows) == 7
    assert "a_package_that_is_not_here" in rows["test_other.py"]["error"]
    assert "assert 1 == 2" in rows["test_bad"]["error"]
    assert rows["test_skipped"]["skipped"] == "no card"
    said, rows = outcomes("2026-11-27 13:00:00 abd")
    assert "1 failed" in said
    assert "passed" not in said
    assert len(rows) == 7


@pytest.mark.parametrize("without", [(), ("diffusers", "xdist", "pytest_timeout")], ids=str)
def test_a_dry_run_leaves_what_it_promises(tmp_path, without):
    """End to end under the interpreter; also where little more than torch is installed."""
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(GUARD.format(missing=set(without)))
    out = tmp_path / "out"
    path = [str(tmp_path / "guard"), os.environ.get("PYTHONPATH", "")] if without else []
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry-run", "-o", str(out)]
    ran = subprocess.run(
        [*command, "--seconds", "900", "--tests", SHORT],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))} if path else None,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    files = [file for file in out.rglob("*") if file.is_file()]
    assert {file.name for file in files} == {"rows.jsonl", "log.txt"}
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert not [row for row in rows if "error" in row]
    measured = {row["step"] for row in rows if not {"left_out", "skipped"} & row.keys()}
    assert measured >= {"machine", "tests", "calls"}
    levels = {row["level"] for row in rows if "level" in row}
    if without:
        reasons = {row["step"]: row.get("left_out") for row in rows if row["name"] == gpu.PROCESS}
        assert reasons["steps"] == "diffusers is not installed"
        assert levels == {"operator"}
    else:
        assert levels == {"operator", "step", "variant"}
    assert "| tiny-24x13x8, batch 1 |" in report.tables(report.read(out / "rows.jsonl"))
