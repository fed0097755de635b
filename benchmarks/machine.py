"""What the operating system tells of this machine and of processes: Linux's /proc, and the standard library alone."""

import math
import os
import platform
import time
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def describe() -> dict[str, str]:
    """Returns what figures depend on: date, processor, cores, memory, kernel, Python."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / 2**30:.1f} GiB",
        "kernel": platform.release(),
        "Python": platform.python_version(),
    }


def available_bytes() -> int:
    """Returns the memory that a process could still take."""
    return 1024 * int(_field("/proc/meminfo", "MemAvailable").split()[0])


def peak_bytes(pid: int) -> int:
    """Returns the most memory that a process has had resident (VmHWM)."""
    return 1024 * int(_field(f"/proc/{pid}/status", "VmHWM").split()[0])


def cpu_seconds(pid: int) -> float:
    """Returns the processor time of a process and of those of its children that have ended; it grows in 10 ms."""
    return sum(map(int, _stat(pid)[11:15])) / _TICKS


def tree(root: int) -> list[int]:
    """Returns a process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                children.setdefault(int(_stat(int(entry.name))[1]), []).append(int(entry.name))
            except OSError:  # it has ended meanwhile
                continue
    found, todo = [], [root]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def tree_cpu_seconds(root: int) -> float:
    """Returns the processor time of a tree of processes."""
    total = 0.0
    for pid in tree(root):
        try:
            total += cpu_seconds(pid)
        except OSError:  # it has ended meanwhile
            continue
    return total


def busy_seconds() -> float:
    """Returns the time that all cores together have worked since the machine started."""
    times = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(times) - times[3] - times[4]) / _TICKS  # all but idle and waiting for a disk


def loopback_bytes() -> int:
    """Returns the bytes that all processes have sent over the loopback device, TCP's headers included."""
    return int(_field("/proc/net/dev", "lo").split()[0])


def percentile(values: list[float], percent: float) -> float:
    """Returns the smallest value that `percent` of them do not exceed."""
    return sorted(values)[max(math.ceil(percent / 100 * len(values)) - 1, 0)]


def _stat(pid: int) -> list[str]:
    """Returns the fields of /proc/PID/stat that follow the name, which may have spaces of its own."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _field(file: str, name: str) -> str:
    for line in Path(file).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
