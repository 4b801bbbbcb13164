"""A pytest plugin for a machine that may be gone at any time: each outcome is written as it comes.

pytest -p gpu_tests --ledger rows.jsonl --run 1 --settled settled.txt tests/kernels
"""

import os
from pathlib import Path

import harness
import pytest
from ledger import Ledger

LIMIT = 1500  # characters kept of a failure


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("i2am", "i2am on a GPU")
    group.addoption("--ledger", type=Path, help="file of rows to append to")
    group.addoption("--run", help="name of the run")
    group.addoption("--step", help="name of the step")
    group.addoption("--settled", type=Path, help="names of tests to leave out, a line each")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcomes(config), "i2am-outcomes")


class Outcomes:
    """Writes what became of each test; leaves a process in which no kernel runs any more."""

    def __init__(self, config: pytest.Config) -> None:
        self._ledger = Ledger(config.getoption("--ledger"), config.getoption("--run"))
        self._step = config.getoption("--step")
        # read before any test runs: the processes of xdist must agree on the tests
        names = config.getoption("--settled").read_text(encoding="utf-8").splitlines()
        self._settled = set(names)
        self._is_worker = hasattr(config, "workerinput")
        self._failed: set[str] = set()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list) -> None:
        settled = [item for item in items if item.nodeid in self._settled]
        config.hook.pytest_deselected(items=settled)
        items[:] = [item for item in items if item.nodeid not in self._settled]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self._is_worker:
            self._ledger.write(self._step, report.nodeid, {"error": str(report.longrepr)[-LIMIT:]})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self._is_worker or (report.passed and report.when != "call"):
            return
        found: dict[str, object] = {"seconds": round(report.duration, 2)}
        if report.failed:
            # the crash of a process whose test had failed says less than the failure
            if report.nodeid in self._failed:
                return
            self._failed.add(report.nodeid)
            found["error"] = str(report.longrepr)[-LIMIT:]
        elif report.skipped:
            found["skipped"] = report.longrepr[2].removeprefix("Skipped: ")
        self._ledger.write(self._step, report.nodeid, found)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if harness.is_lost():
            if self._is_worker:
                os._exit(3)  # xdist starts another
            pytest.exit("no kernel runs any more in this process", returncode=3)
