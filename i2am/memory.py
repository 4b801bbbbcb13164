"""Memory: how much there is, how much a call takes, and how to say it."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from i2am.files import read_json

if TYPE_CHECKING:
    import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_memory(device: "torch.device | None" = None) -> int | None:
    """Bytes that can still be allocated on a device, None where the system does not tell.

    Args:
        device: A CPU or CUDA device; None is the CPU.
    """
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    found = [free for free in (_system_memory(), _group_memory()) if free is not None]
    return min(found, default=None)


def _system_memory() -> int | None:
    if _MEMINFO.is_file():
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            name, _, amount = line.partition(":")
            if name == "MemAvailable":
                return int(amount.split()[0]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _group_memory() -> int | None:
    """What the limit of a container (cgroup v2) leaves."""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        statistics = (_CGROUP / "memory.stat").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    if not limit.isdecimal():  # "max": no limit
        return None
    # file contents that the kernel drops when memory is asked for
    cached = dict(zip(statistics[::2], statistics[1::2], strict=False)).get("inactive_file", "0")
    return max(int(limit) - used + int(cached), 0)


def readable(count: int) -> str:
    """A number of bytes with a unit."""
    for unit, shift in (("GiB", 30), ("MiB", 20)):
        if count >= 1 << shift:
            return f"{count / (1 << shift):.1f} {unit}"
    return f"{count / 1024:.1f} KiB"


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that a call held at once, of all that PyTorch's CPU allocator gave it."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = read_json(trace, limit=2**34)["traceEvents"]
    live = peak = 0
    for event in events:
        if event.get("name") == "[memory]":
            live += event["args"]["Bytes"]
            peak = max(peak, live)
    return peak
