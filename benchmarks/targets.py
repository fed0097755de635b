"""The performance targets, most of them ratios of two figures of one run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks import durability, gpu, memory, startup, wire, workers
from benchmarks.baselines import EMPTY_CALL, THERE_AND_BACK
from benchmarks.kernel import KERNEL, LIMIT
from benchmarks.local import COMPILED, DEFAULT
from benchmarks.peers.suite import OURS, OVER_TCP
from benchmarks.processes import BFLOAT16, SHARED, TCP
from benchmarks.results import Results, figures, timings

Measure = Callable[[Results], float | None]


@dataclass(frozen=True, slots=True)
class Target:
    """A target: its text, the function that finds its figure among the results, and its bound."""

    text: str
    measure: Measure
    at_most: float | None = None
    at_least: float | None = None

    def met(self, value: float) -> bool:
        """Returns whether a figure meets the bound."""
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)

    @property
    def bound(self) -> str:
        """The bound as text."""
        return f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"


def table(results: Results, whole: bool = True) -> str:
    """Returns the table of targets, measured figures and verdicts.

    Args:
        results: The results of a run.
        whole: Include targets whose figures were not measured.
    """
    lines = ["| target | bound | measured | |", "| --- | ---: | ---: | --- |"]
    for target in TARGETS:
        value = target.measure(results)
        if value is not None:
            verdict = "met" if target.met(value) else "**missed**"
            lines.append(f"| {target.text} | {target.bound} | {value:.3g} | {verdict} |")
        elif whole:
            lines.append(f"| {target.text} | {target.bound} | | not measured |")
    return "\n".join(lines)


def _ratio(key: str, row: str, other: str, scale: float = 1.0) -> Measure:
    """Returns a function that finds the ratio of the medians of two rows."""

    def measure(results: Results) -> float | None:
        found = timings(results, key)
        ratio = found.ratio(row, other) if found else None
        return None if ratio is None else ratio * scale

    return measure


def _seconds(key: str, row: str) -> Measure:
    def measure(results: Results) -> float | None:
        found = timings(results, key)
        return found.rows[row].median if found and row in found.rows else None

    return measure


def _p99(key: str, row: str) -> Measure:
    def measure(results: Results) -> float | None:
        found = timings(results, key)
        return found.rows[row].p99 if found and row in found.rows else None

    return measure


def _worst(key: str, column: str, worst: Callable[[Sequence[float]], float]) -> Measure:
    """Returns a function that finds the worst figure of a column."""

    def measure(results: Results) -> float | None:
        found = figures(results, key)
        values = list(found.column(column).values()) if found else []
        return worst(values) if values else None

    return measure


def _best_peer(key: str, ours: str, among: Sequence[str] | None = None) -> Measure:
    """Returns a function that finds the ratio of our time to the best peer's; `among` limits the peers."""

    def measure(results: Results) -> float | None:
        found = timings(results, key)
        if not found or ours not in found.rows:
            return None
        peers = [row for row in found.rows if not row.startswith(OURS) and (among is None or row in among)]
        return max((found.ratio(ours, peer) or 0.0 for peer in peers), default=None)

    return measure


def _rate_beside_peers(ours: str, among: Sequence[str] | None = None) -> Measure:
    """Returns a function that finds the ratio of our steps per second in workload C to the best peer's."""

    def measure(results: Results) -> float | None:
        found = figures(results, "peers-c")
        rates = found.column(workers.STEPS) if found else {}
        peers = [rate for row, rate in rates.items() if not row.startswith(OURS) and (among is None or row in among)]
        return rates[ours] / max(peers) if ours in rates and peers else None

    return measure


def _many(results: Results) -> float | None:
    found = figures(results, "workers-count")
    rates = found.column(workers.STEPS) if found else {}
    return rates["64 workers"] / rates["4 workers"] if {"64 workers", "4 workers"} <= rates.keys() else None


def _on_gpu(row: str, other: str, worst: Callable[[Sequence[float]], float]) -> Measure:
    """Returns a function that finds the worst ratio of two rows among the optimizers."""
    measures = [_ratio(gpu.key(name, gpu.SIZES[-1]), row, other) for name in gpu.OPTIMIZERS]

    def measure(results: Results) -> float | None:
        ratios = [ratio for ratio in (measured(results) for measured in measures) if ratio is not None]
        return worst(ratios) if ratios else None

    return measure


TARGETS = (
    Target("A over TCP, of raw TCP there and back", _ratio("step-a", TCP.row, THERE_AND_BACK), at_most=1.6),
    Target("A over TCP, of the best peer over TCP", _best_peer("peers-a", TCP.row, OVER_TCP), at_most=0.8),
    Target("A over TCP in bfloat16, of float32", _ratio("step-a", BFLOAT16.row, TCP.row), at_most=0.6),
    Target("A in shared memory, of the kernel alone", _ratio("step-a", SHARED.row, KERNEL), at_most=2),
    Target("A in shared memory, of a local default step", _ratio("step-a", SHARED.row, DEFAULT), at_most=0.6),
    Target("A in shared memory, of the best peer", _best_peer("peers-a", SHARED.row), at_most=0.25),
    Target("B over TCP, p50, of an empty gRPC call", _ratio("step-b", TCP.row, EMPTY_CALL), at_most=1.25),
    Target("B over TCP, p50, of the best peer", _best_peer("peers-b", TCP.row), at_most=1),
    Target("C over TCP, steps/s, of the best peer over TCP", _rate_beside_peers(TCP.row, OVER_TCP), at_least=1.6),
    Target(
        "C in shared memory, steps/s, of the best peer over TCP", _rate_beside_peers(SHARED.row, OVER_TCP), at_least=4
    ),
    Target("C, pushes lost", _worst("workers-c", workers.LOST, lambda lost: max(map(abs, lost))), at_most=0),
    Target("64 workers' steps/s, of that of 4", _many, at_least=0.8),
    Target("slowest worker, of an equal share", _worst("workers-count", workers.SHARE, min), at_least=0.5),
    Target("kernel on the CPU, of memory's limit", _ratio("kernel-cpu", KERNEL, LIMIT), at_most=1.15),
    Target("kernel on the CPU, of torch compiled", _ratio("kernel-cpu", KERNEL, COMPILED), at_most=1),
    Target("torch default on the CPU, of the kernel", _ratio("kernel-cpu", DEFAULT, KERNEL), at_least=3),
    Target(
        "GPU, 1 G parameters, any optimizer: bandwidth, of a copy's", _on_gpu(gpu.LIMIT, gpu.KERNEL, min), at_least=0.9
    ),
    Target(
        "GPU, 1 G parameters, Adadelta: torch foreach, of the kernel",
        _ratio(gpu.key("adadelta", gpu.SIZES[-1]), gpu.FOREACH, gpu.KERNEL),
        at_least=3.5,
    ),
    Target(
        "GPU, 1 G parameters, any optimizer: the kernel, of torch compiled",
        _on_gpu(gpu.KERNEL, gpu.COMPILED, max),
        at_most=1,
    ),
    Target("server's memory, of what is allowed", _worst("memory", memory.RATIO, max), at_most=1),
    Target(
        "A with a snapshot every 50 updates, of none",
        _ratio("durability-snapshot", durability.SNAPSHOT, durability.NONE),
        at_most=1.02,
    ),
    Target(
        "25 M parameters, from SIGKILL to the first push, p99, s",
        _p99("durability-recovery", durability.FIRST_PUSH),
        at_most=3,
    ),
    Target("start to SERVING, s", _seconds("startup", startup.SERVING), at_most=1),
    Target("import deltaserve, s", _seconds("startup", startup.IMPORT), at_most=0.3),
    Target("bytes on the wire, more than the tensors', %", _worst("wire", wire.OVERHEAD, max), at_most=0.2),
)
