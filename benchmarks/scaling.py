"""Predicts steps with several shards, workers and networks from the results of one machine, and what limits them."""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.kernel import KERNEL
from benchmarks.models import SHAPES_C, SIZE_A, elements
from benchmarks.processes import TCP
from benchmarks.results import Results, Timings, figures, timings
from benchmarks.workers import STEPS, WORKLOAD_C

CORES = 2
"""Cores of the measured machine and of each predicted machine."""

ROUND_TRIP_SECONDS = 100e-6
"""Round-trip time between two machines of a data centre; on loopback it is part of the measured call."""

FAN_OUT_SECONDS = 50e-6
"""The cost of one more shard in a worker's step: a call that is started and awaited. An assumption so far."""

ELEMENT_BYTES = 4

NETWORKS = (1, 10, 25, 100)
"""Network speeds in Gbit/s, full duplex."""

SHARDS = (1, 4, 16, 64)
MODELS = (SIZE_A, 1_000_000_000)


@dataclass(frozen=True, slots=True)
class Costs:
    """The costs measured on one machine, over loopback TCP.

    Attributes:
        call: Seconds of a step of a tiny model.
        loopback: Seconds per byte of a step, worker and server on one machine; a parameter is four bytes each way.
        worker: Processor seconds per byte in the worker.
        server: Processor seconds per byte in the server, without the kernel.
        worker_call: Processor seconds per step in the worker, for any size.
        server_call: Processor seconds per step in the server, for any size.
        kernel: Seconds of the kernel per parameter, on all cores.
    """

    call: float
    loopback: float
    worker: float
    server: float
    worker_call: float
    server_call: float
    kernel: float


def costs(results: Results) -> Costs | None:
    """Returns the costs, computed from workloads A and B; None if a table is missing."""
    large, small = timings(results, "step-a"), timings(results, "step-b")
    used = figures(results, "step-processor")
    if not (large and small and used):
        return None
    size, step_bytes = SIZE_A, 2 * ELEMENT_BYTES * SIZE_A
    kernel = large.rows[KERNEL].median / size
    call = small.rows[TCP.row].median
    (worker_a, worker_b), (server_a, server_b) = (
        [value / 1e3 for value in used.column(side).values()] for side in ("worker ms", "server ms")
    )
    return Costs(
        call=call,
        loopback=(large.rows[TCP.row].median - call - kernel * size) / step_bytes,
        worker=(worker_a - worker_b) / step_bytes,
        server=max(server_a - server_b - CORES * kernel * size, 0.0) / step_bytes,
        worker_call=worker_b,
        server_call=server_b,
        kernel=kernel,
    )


def one_machine(cost: Costs, parameters: int) -> float:
    """Returns the seconds of a step if worker and server share a machine."""
    return cost.call + 2 * ELEMENT_BYTES * parameters * cost.loopback + parameters * cost.kernel


def together(cost: Costs, parameters: int) -> float:
    """Returns the steps per second of enough workers to keep all cores of one machine busy."""
    bytes_a_step = 2 * ELEMENT_BYTES * parameters
    sides = cost.worker_call + cost.server_call + bytes_a_step * (cost.worker + cost.server)
    return 1 / (sides / CORES + cost.kernel * parameters)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The duration of a worker's step and its bottleneck, and the most steps per second of the shards and theirs."""

    seconds: float
    limit: str
    rate: float
    rate_limit: str

    @property
    def workers(self) -> float:
        """Number of workers, doing nothing but steps, that keep the shards busy."""
        return max(self.rate * self.seconds, 1.0)


def predict(cost: Costs, parameters: int, shards: int, gigabits: float) -> Prediction:
    """Predicts steps on several machines, one for each shard and each worker.

    A worker sends to all shards at once, then receives from all at once. Each direction is as slow as the slowest of
    the worker on one core, the network, and a shard on one core. Shards update between the two directions.

    Args:
        cost: The measured costs.
        parameters: Number of parameters, divided evenly among the shards.
        shards: Number of shards.
        gigabits: Speed of the network in each direction, in Gbit/s.
    """
    bytes_a_second = gigabits * 1e9 / 8
    way = ELEMENT_BYTES * parameters
    ways = {
        "network": way / bytes_a_second,
        "worker's side": way * cost.worker,
        "shard's side": way / shards * cost.server,
    }
    parts = {
        "calls": cost.call + ROUND_TRIP_SECONDS + FAN_OUT_SECONDS * (shards - 1),
        max(ways, key=lambda name: ways[name]): 2 * max(ways.values()),
        "kernel": cost.kernel * parameters / shards,
    }
    processor = (cost.server_call + 2 * way / shards * cost.server) / CORES
    bounds = {
        "network": 1 / (way / shards / bytes_a_second),
        "shard's side" if processor > parts["kernel"] else "kernel": 1 / (processor + parts["kernel"]),
    }
    return Prediction(
        seconds=sum(parts.values()),
        limit=max(parts, key=lambda name: parts[name]),
        rate=min(bounds.values()),
        rate_limit=min(bounds, key=lambda name: bounds[name]),
    )


def report(results: Results) -> str:
    """Returns costs, their check against measurements, and predictions, as Markdown."""
    cost = costs(results)
    if cost is None:
        return "There is nothing to predict from: measure step-a, step-b and step-processor first."
    text = (
        f"A step costs {cost.call * 1e6:,.0f} us, and per GB of parameters and gradients {cost.loopback * 1e9:.2f} s "
        f"on loopback; processor time per GB: worker {cost.worker * 1e9:.2f} s, server {cost.server * 1e9:.2f} s; "
        f"kernel {cost.kernel * 1e9:.2f} s per 1 G parameters.\n"
    )
    lines = [
        text,
        "| one machine | measured | predicted | error |",
        "| --- | ---: | ---: | ---: |",
    ]
    errors = []
    for name, unit, measured, predicted in _checks(results, cost):
        errors.append(abs(predicted / measured - 1))
        lines.append(f"| {name} | {measured:.3g} {unit} | {predicted:.3g} {unit} | {predicted / measured - 1:+.0%} |")
    if errors:
        lines.append(f"\nLargest error {max(errors):.0%}, of {len(errors)} figures that the costs were not taken from.")
    return "\n".join([*lines, "", *_predictions(cost)])


def _checks(results: Results, cost: Costs) -> Iterator[tuple[str, str, float, float]]:
    """Yields the checks: name, unit, measured and predicted value."""
    for key, result in results.items():
        size = key.removeprefix("step-")
        if size.isdecimal() and isinstance(result, Timings):
            measured = result.rows[TCP.row].median
            yield f"step of {int(size):,} parameters", "ms", measured * 1e3, one_machine(cost, int(size)) * 1e3
    together_c = figures(results, "workers-c")
    if together_c and TCP.row in together_c.rows:
        measured = together_c.column(STEPS)[TCP.row]
        yield f"{WORKLOAD_C} workers, 1 M parameters", "steps/s", measured, together(cost, elements(SHAPES_C))


def _predictions(cost: Costs) -> Iterator[str]:
    """Yields two tables by model, network and number of shards: a worker's step, and the steps of all workers."""
    heads = " | ".join(f"{count} shard{'s' if count > 1 else ''}" for count in SHARDS)
    for title, text in (("a worker's step", _own_step), ("all workers together", _all_steps)):
        yield f"| {title} | {heads} |\n| --- |{' --- |' * len(SHARDS)}"
        for parameters in MODELS:
            for gigabits in NETWORKS:
                cells = (text(predict(cost, parameters, shards, gigabits)) for shards in SHARDS)
                yield f"| {parameters / 1e6:,.0f} M, {gigabits} Gbit/s | {' | '.join(cells)} |"
        yield ""


def _own_step(found: Prediction) -> str:
    unit, value = ("s", found.seconds) if found.seconds >= 1 else ("ms", found.seconds * 1e3)
    return f"{value:.3g} {unit}, {found.limit}"


def _all_steps(found: Prediction) -> str:
    rate = f"{found.rate:,.0f}" if found.rate >= 100 else f"{found.rate:.3g}"
    return f"{rate} steps/s of {found.workers:,.0f} workers, {found.rate_limit}"
