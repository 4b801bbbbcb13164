"""Turn a pytest-benchmark file into a small result file and the README's tables.

    make benchmark
    python benchmarks/report.py .benchmarks/latest.json benchmarks/results/cpu.json

Keeps medians and the 20th and 80th percentiles, versions and commit; prints Markdown with ratios.
"""

import json
import platform
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch


def summarize(raw: dict) -> dict:
    """The figures of a run, grouped as the benchmarks group them."""
    groups: dict[str, dict] = {}
    for benchmark in raw["benchmarks"]:
        way = benchmark["params"]["way"]
        p20, p50, p80 = np.percentile(benchmark["stats"]["data"], (20, 50, 80))
        groups.setdefault(benchmark["group"], {})[way] = {
            "p20_ms": round(1e3 * p20, 3),
            "p50_ms": round(1e3 * p50, 3),
            "p80_ms": round(1e3 * p80, 3),
            **benchmark["extra_info"],
        }
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    return {
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": commit.stdout.strip(),
        "groups": groups,
    }


def tables(result: dict) -> str:
    """Markdown: operator calls as ratios to the attention call, then whole UNet steps."""
    calls = {name: ways for name, ways in result["groups"].items() if "attention" in ways}
    steps = {name: ways for name, ways in result["groups"].items() if "recorded" in ways}
    ways = ("streaming", "streaming, given lse", "materialised")
    lines = [
        f"| one call | attention | {' | '.join(ways)} |",
        f"| --- | --- | {' | '.join('---' for _ in ways)} |",
    ]
    for name, call in calls.items():
        base = call["attention"]["p50_ms"]
        ratios = " | ".join(f"+{call[way]['p50_ms'] / base:.2f} x" for way in ways)
        lines.append(f"| {name} | {base:.1f} ms | {ratios} |")
    lines += [
        "",
        "| one UNet step | plain | recorded | materialised |",
        "| --- | --- | --- | --- |",
    ]
    for name, step in steps.items():
        recorded, materialised = step["recorded"], step["materialised"]
        lines.append(
            f"| {name} | {recorded['plain_s']:.2f} s | {recorded['ratio']:.3f} x | "
            f"{materialised['ratio']:.3f} x |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    result = summarize(json.loads(source.read_text(encoding="utf-8")))
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(tables(result))
