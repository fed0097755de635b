"""Runs deltaserve and the installed peers in turns, each run in new processes, and makes tables."""

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from time import sleep

from benchmarks import machine, workers
from benchmarks.peers.common import Record
from benchmarks.processes import TRANSPORTS
from benchmarks.results import Figures, Result, Timings
from benchmarks.timing import Timing

OURS = "deltaserve"
"""The start of the names of our rows."""

SIZES = ("1000", "100000", "10000000")
"""More numbers of parameters for the plot, measured in one round."""

_ROOT = Path(__file__).parents[2]
_ENVIRONMENTS = _ROOT / ".venv-peers"
_PATIENCE_SECONDS = 180.0
_QUIET_SHARE, _QUIET_SECONDS = 0.12, 30.0


@dataclass(frozen=True, slots=True)
class System:
    """A variant of a peer.

    Attributes:
        row: Name in the tables.
        module: Module of the adapter, and name of its environment.
        variant: The adapter's name of the variant.
        over_tcp: Whether tensors travel over TCP, as between two hosts.
    """

    row: str
    module: str
    variant: str
    over_tcp: bool = True

    @property
    def python(self) -> Path:
        """The Python interpreter with the peer's packages."""
        return Path(sys.executable) if self.module == "ours" else _ENVIRONMENTS / self.module / "bin" / "python"

    @property
    def installed(self) -> bool:
        """Whether the environment of the peer is set up."""
        return self.module == "ours" or (_ENVIRONMENTS / self.module / ".setup").exists()


PEERS = (
    System("PyTorch RPC, TCP", "torch_rpc", "tcp"),
    System("PyTorch RPC, default (shared memory)", "torch_rpc", "default", over_tcp=False),
    System("TensorFlow ParameterServer", "tensorflow_ps", "legacy"),
    System("Ray actor, two nodes", "ray_actor", "two-nodes"),
    System("Ray actor, one node (shared memory)", "ray_actor", "local", over_tcp=False),
    System("grpcio by hand, one message of bytes", "grpc_naive", "bytes"),
)
OVER_TCP = tuple(system.row for system in PEERS if system.over_tcp)
_SYSTEMS = (*(System(transport.row, "ours", transport.name) for transport in TRANSPORTS), *PEERS)

_Records = dict[System, list[Record]]


def measure(quick: bool, only: str) -> Iterator[tuple[str, Result]]:
    """Runs the workloads whose key starts with `only` and yields their tables; none if no peer is installed."""
    missing = sorted({system.module for system in PEERS if not system.installed})
    systems = [system for system in _SYSTEMS if system.installed]
    rounds = 1 if quick else 3
    for workload in ("a", "b", "c", *(() if quick else SIZES)):
        key = f"peers-{workload}"
        if not key.startswith(only):
            continue
        if all(system.module == "ours" for system in systems):
            print("peers: none is installed; run `make bench-peers` to install them", flush=True)
            return
        records = _by_turns(systems, workload, 1 if workload in SIZES else rounds, quick)
        notes = (f"Not installed, left out: {', '.join(missing)}.",) if missing else ()
        yield key, _table(workload, records, notes)
        if workload in ("a", "c"):
            yield f"{key}-cost", _cost(workload, records)


def _by_turns(systems: Sequence[System], workload: str, rounds: int, quick: bool) -> _Records:
    records: _Records = {system: [] for system in systems}
    for _ in range(rounds):
        for system in systems:
            if not quick:
                _wait_until_quiet()
            records[system].append(_run(system, workload, quick))
    return records


def _wait_until_quiet() -> None:
    """Waits until the machine is quiet, with a limit: processes of the run before may still be ending."""
    for _ in range(round(_QUIET_SECONDS)):
        before = machine.busy_seconds()
        sleep(1)
        if machine.busy_seconds() - before < _QUIET_SHARE:
            return


def _run(system: System, workload: str, quick: bool) -> Record:
    command = [str(system.python), "-m", f"benchmarks.peers.{system.module}", "--workload", workload]
    command += ["--variant", system.variant, *(["--quick"] if quick else [])]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    with subprocess.Popen(
        command,
        cwd=_ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as child:
        try:
            answer = child.communicate(timeout=_PATIENCE_SECONDS)[0].strip()
        except subprocess.TimeoutExpired:
            answer = ""
        finally:
            _end(child.pid)
    record: Record = json.loads(answer.splitlines()[-1]) if answer else {"failed": "no answer"}
    if "failed" in record:
        print(f"{system.row}, workload {workload}: {record['failed'].strip().splitlines()[-1]}", file=sys.stderr)
    return record


def _end(session: int) -> None:
    """Kills the processes that a run left behind."""
    try:
        os.killpg(session, signal.SIGKILL)
    except ProcessLookupError:
        return


def _table(workload: str, records: Mapping[System, Iterable[Record]], notes: tuple[str, ...]) -> Result:
    good = {system.row: [one for one in found if "failed" not in one] for system, found in records.items()}
    failed = [system.row for system, found in records.items() if any("failed" in one for one in found)]
    wrong = [row for row, found in good.items() if not all(one["correct"] for one in found)]
    notes += (f"Runs that failed: {', '.join(failed)}.",) if failed else ()
    notes += (f"WRONG weights: {', '.join(wrong)}.",) if wrong else ("All weights are Adadelta's, in float64.",)
    good = {row: found for row, found in good.items() if found}
    title = f"peers: workload {workload.upper()}" if workload in "abc" else f"peers: {int(workload):,} parameters"
    if workload != "c":
        rows = {row: Timing(tuple(chain.from_iterable(one["seconds"] for one in found))) for row, found in good.items()}
        return Timings(title, next(iter(rows), ""), rows, notes=notes)
    rates = {row: [one["steps_per_second"] for one in found] for row, found in good.items()}
    lost = {row: float(sum(one["lost"] for one in found)) for row, found in good.items()}
    columns = (workers.STEPS, "lowest", "highest", workers.LOST)
    lines = {row: (statistics.median(rate), min(rate), max(rate), lost[row]) for row, rate in rates.items()}
    return Figures(title, columns, dict(lines), notes)


def _cost(workload: str, records: Mapping[System, Iterable[Record]]) -> Figures:
    """Returns the cost of a step besides its time."""
    columns = {
        "processor ms a step": ("cpu_seconds", 1e3),
        "loopback MB a step": ("loopback_bytes", 1e-6),
        "server MB": ("server_bytes", 1e-6),
        "worker MB": ("worker_bytes", 1e-6),
        "others, % of a core": ("others_share_of_a_core", 100.0),
    }
    rows: dict[str, tuple[float | None, ...]] = {}
    for system, found in records.items():
        good = [one for one in found if "failed" not in one]
        if good:
            rows[system.row] = tuple(
                statistics.median(one[name] for one in good) * factor for name, factor in columns.values()
            )
    return Figures(f"peers: what workload {workload.upper()} costs", tuple(columns), rows)
