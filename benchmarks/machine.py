"""Facts about this machine and its processes, from /proc. Uses the standard library only."""

import math
import os
import platform
import time
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def describe() -> dict[str, str]:
    """Returns what results depend on: date, processor, its vector instructions, cores, memory, kernel, Python."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "vectors": _vector_instructions(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / 2**30:.1f} GiB",
        "kernel": platform.release(),
        "Python": platform.python_version(),
    }


def _vector_instructions() -> str:
    """Returns the widest vector instructions of the processor, which decide the speed of the kernels."""
    flags = _field("/proc/cpuinfo", "flags").split() or _field("/proc/cpuinfo", "Features").split()
    known = {
        "avx512f": "AVX-512 (512 bits)",
        "avx2": "AVX2 (256 bits)",
        "avx": "AVX (256 bits)",
        "sse2": "SSE2 (128 bits)",
        "sve": "SVE",
        "asimd": "NEON (128 bits)",
    }
    return next((name for flag, name in known.items() if flag in flags), "unknown")


def available_bytes() -> int:
    """Returns the memory that is available to a new process."""
    return 1024 * int(_field("/proc/meminfo", "MemAvailable").split()[0])


def peak_bytes(pid: int) -> int:
    """Returns the peak of a process's resident memory (VmHWM)."""
    return 1024 * int(_field(f"/proc/{pid}/status", "VmHWM").split()[0])


def cpu_seconds(pid: int) -> float:
    """Returns the processor time of a process and its ended children, in steps of 10 ms."""
    return sum(map(int, _stat(pid)[11:15])) / _TICKS


def tree(root: int) -> list[int]:
    """Returns a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                children.setdefault(int(_stat(int(entry.name))[1]), []).append(int(entry.name))
            except OSError:  # the process has ended meanwhile
                continue
    found, todo = [], [root]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def tree_cpu_seconds(root: int) -> float:
    """Returns the processor time of a process and all its descendants."""
    total = 0.0
    for pid in tree(root):
        try:
            total += cpu_seconds(pid)
        except OSError:  # the process has ended meanwhile
            continue
    return total


def busy_seconds() -> float:
    """Returns the busy time of all cores since the machine started."""
    times = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(times) - times[3] - times[4]) / _TICKS  # without idle time and waiting for a disk


def loopback_bytes() -> int:
    """Returns the bytes sent over the loopback device since the machine started, TCP headers included."""
    return int(_field("/proc/net/dev", "lo").split()[0])


def percentile(values: list[float], percent: float) -> float:
    """Returns the smallest value that `percent` percent of the values do not exceed."""
    return sorted(values)[max(math.ceil(percent / 100 * len(values)) - 1, 0)]


def _stat(pid: int) -> list[str]:
    """Returns the fields of /proc/PID/stat after the process name, which may contain spaces."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _field(file: str, name: str) -> str:
    for line in Path(file).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
