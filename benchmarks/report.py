"""Turn what the benchmarks wrote into one small result file, and that into tables.

    python benchmarks/report.py .benchmarks/*.json benchmarks/results/cpu.json

Takes JSON of pytest-benchmark; keeps medians, 20th and 80th percentiles, peak memory, device,
versions and commit; prints Markdown. Given the result alone, or the rows that ``gpu.py`` wrote, it
prints those.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import harness
from ledger import Ledger

from i2am.files import read_json, write

Row = dict[str, Any]
Cell = Callable[[Row], str | None]

CALL_WAYS = (
    "beside",
    "beside, given lse",
    "fused",
    "materialised",
    "chunked",
    "flash-colreduce",
    "flash-colsum",
)
STEP_WAYS = ("beside", "fused", "materialised", "published")
BUDGET_WAYS = ("plain", "beside", "fused", "materialised")


def summarize(sources: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One result of several files' contents, in their order."""
    result: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "commit": "unknown"}
    rows: list[Row] = []
    left_out: list[Row] = []
    for source in sources:
        result |= source["machine_info"]["i2am"]
        result["commit"] = source["commit_info"].get("id") or result["commit"]
        rows += [
            harness.row(benchmark["group"], benchmark["extra_info"], benchmark["stats"]["data"])
            for benchmark in source["benchmarks"]
        ]
        left_out += source.get("left_out", [])
    return result | {"rows": rows, "left_out": left_out, "budgets": {"peaks": [], "largest": []}}


def from_rows(lines: Iterable[Row]) -> dict[str, Any]:
    """A result of the rows that ``gpu.py`` writes."""
    result: dict[str, Any] = {"device": "unknown", "versions": {}, "commit": "unknown"}
    rows: list[Row] = []
    left_out: list[Row] = []
    budgets: dict[str, list[Row]] = {"peaks": [], "largest": []}
    commits: dict[str, None] = {}
    for line in lines:
        day, _, commit = line["run"].split(" ")
        commits[commit] = None
        result |= {"date": day, "commit": ", ".join(commits)}
        if (line["step"], line["name"]) == ("machine", "about"):
            result |= line
        if "level" in line:
            rows.append(line)
        for reason in ("error", "left_out"):
            if reason in line:
                left_out.append({"test": line["name"], "reason": line[reason]})
        for table in budgets:
            budgets[table] += line.get(table, [])
    return result | {"rows": rows, "left_out": left_out, "budgets": budgets}


def read(path: Path) -> dict[str, Any]:
    """A result from a file of either kind."""
    if path.suffix == ".jsonl":
        return from_rows(Ledger(path, run="").rows())
    result: dict[str, Any] = read_json(path)
    return result


def tables(result: Mapping[str, Any]) -> str:
    """Everything that a reader asks first, as Markdown; the file has the rest."""
    rows = result["rows"]
    levels = {
        level: [row for row in rows if row["level"] == level]
        for level in ("operator", "step", "variant", "run")
    }
    calls = levels["operator"]
    parts = [
        _head(result),
        _calls(calls, "time of a call with recording", "attention alone", _plain_ms, _ratio),
        _calls(calls, "the same, kernels alone", "attention alone", _plain_kernels, _kernel_ratio),
        _calls(calls, "MiB held while running", "attention alone", _plain_memory, _memory),
        _calls(calls, "share of the roofline", "floor, given lse", _floor, _share),
        _steps(levels["step"]),
        _variants(levels["variant"]),
        _runs(levels["run"]),
        _budgets(result["budgets"]["largest"]),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _head(result: Mapping[str, Any]) -> list[str]:
    commits = re.sub(r"\b([0-9a-f]{7})[0-9a-f]+", r"\1", result["commit"])
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return [f"{result['device']}, {versions}, commit {commits}, {result['date']}."]


def _calls(rows: list[Row], title: str, alone_title: str, alone: Cell, cell: Cell) -> list[str]:
    """One line per shape; only the ways that ``cell`` knows for some shape."""
    ways = [way for way in CALL_WAYS if any(row["way"] == way and cell(row) for row in rows)]
    if not ways:
        return []
    lines = _header(title, alone_title, *ways)
    for (group, batch), members in _grouped(rows, "group", "batch").items():
        cells = {row["way"]: cell(row) for row in members}
        first = next(filter(None, map(alone, members)), "-")
        name = f"{group}, batch {batch}"
        lines.append(_line(name, first, *(cells.get(way) or "-" for way in ways)))
    return lines


def _plain_ms(row: Row) -> str:
    return f"{row['plain_ms']:.3g} ms"


def _plain_kernels(row: Row) -> str | None:
    return f"{row['plain_kernels_ms']:.3g} ms" if row.get("plain_kernels_ms") else None


def _plain_memory(row: Row) -> str:
    return f"{row['plain_memory_MiB']:.3g}"


def _floor(row: Row) -> str | None:
    known = row["way"] == "beside, given lse" and row.get("floor_ms")
    return f"{row['floor_ms']:.3g} ms" if known else None


def _ratio(row: Row) -> str | None:
    """As a multiple of un-recorded attention, which is added where a way runs beside it."""
    if "wrong" in row:
        return "wrong"
    return f"{row['ratio'] + (not row['attends']):.2f} x"


def _kernel_ratio(row: Row) -> str | None:
    alone, recorded = row.get("plain_kernels_ms"), row.get("kernels_ms")
    if not alone or not recorded:
        return None
    return "wrong" if "wrong" in row else f"{recorded / alone + (not row['attends']):.2f} x"


def _memory(row: Row) -> str:
    return f"{row['memory_MiB']:.3g}"


def _share(row: Row) -> str | None:
    if not row.get("floor_ms") or "wrong" in row:
        return None
    return f"{100 * row['floor_ms'] / (row.get('kernels_ms') or row['p50_ms']):.0f} %"


def _steps(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    lines = _header("one UNet step", "plain", *STEP_WAYS)
    for (group,), members in _grouped(rows, "group").items():
        cells = {
            row["way"]: f"{row['ratio']:.3f} x, "
            f"{row['memory_MiB'] - row['plain_memory_MiB']:+.3g} MiB"
            for row in members
        }
        plain = f"{members[0]['plain_ms']:.4g} ms"
        lines.append(_line(group, plain, *(cells.get(way, "-") for way in STEP_WAYS)))
    return lines


def _variants(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    lines = _header("one guided UNet step", "plain", "recorded")
    for row in rows:
        lines.append(_line(row["group"], f"{row['plain_ms']:.4g} ms", f"{row['ratio']:.3f} x"))
    return lines


def _runs(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    lines = _header("one run", "plain", "beside", "fused")
    for (group,), members in _grouped(rows, "group").items():
        cells = {row["way"]: f"{row['ratio']:.3f} x" for row in members}
        plain = f"{members[0]['plain_ms'] / 1e3:.3g} s"
        lines.append(_line(group, plain, cells.get("beside", "-"), cells.get("fused", "-")))
    return lines


def _budgets(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    lines = _header("largest batch of a guided SD-1.5-size step", *BUDGET_WAYS)
    for (budget,), members in _grouped(rows, "budget_GB").items():
        found = {row["way"]: row["batch"] for row in members}
        lines.append(_line(f"{budget} GB", *(found.get(way, "-") for way in BUDGET_WAYS)))
    return lines


def _grouped(rows: list[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _header(*cells: str) -> list[str]:
    return [_line(*cells), _line(*("---" for _ in cells))]


def _line(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main(*sources: Path, target: Path) -> None:
    if sources:
        contents = [*map(read_json, sources)]
        write(target, (json.dumps(summarize(contents), indent=1) + "\n").encode())
    print(tables(read(target)))


if __name__ == "__main__":
    *sources, target = map(Path, sys.argv[1:])
    main(*sources, target=target)
