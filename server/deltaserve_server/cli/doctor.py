"""`deltaserve doctor`: examines a server from this machine, and says what to do about problems."""

import secrets
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from deltaserve_server.cli.display import format_bytes
from deltaserve_server.cli.errors import CommandError
from deltaserve_server.cli.health import check
from deltaserve_server.cli.models import DURABILITY, device
from deltaserve_server.cli.options import DEFAULT_TARGET, TargetArgument

if TYPE_CHECKING:
    import deltaserve

CONNECT_SECONDS = 5.0
MEASURE_SECONDS = 60.0
ROUND_TRIPS = 100  # enough for a 99th percentile
SLOW_ROUND_TRIP_SECONDS = 0.005
SLOW_MB_PER_SECOND = 100.0
VECTOR_ELEMENTS = 4 << 20  # so large that the rate decides, not the round trip
STEPS = 5
FREE_MEMORY = "delete models, or start the server with a larger --memory-bytes"
Quick = Annotated[bool, typer.Option("--quick", help="Skip the measurements.")]


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was examined, what was found, and what to do; None if there is no problem."""

    name: str
    text: str
    advice: str | None = None


def doctor(target: TargetArgument = DEFAULT_TARGET, quick: Quick = False) -> None:
    """Examine a server from this machine: connection, version, limits, latency, throughput.

    To measure throughput it creates a model of 16 MiB under a random name and deletes it.
    """
    problems = 0
    for finding in examine(target, quick):
        is_problem = finding.advice is not None
        mark = typer.style("look", fg="red", bold=True) if is_problem else typer.style("ok  ", fg="green")
        typer.echo(f"{mark}  {finding.name:<11} {finding.text}")
        if is_problem:
            typer.echo(f"      {'':<11} -> {finding.advice}")
            problems += 1
    if problems:
        raise CommandError(f"{problems} problem{'s' * (problems > 1)} found, see above")


def examine(target: str, quick: bool) -> Iterator[Finding]:
    """Yields each finding as soon as it is made; ends after one that prevents the rest of the examination."""
    import deltaserve

    reachable = _reachable(target)
    yield reachable
    if reachable.advice is not None:
        return
    yield _health(target)
    with deltaserve.connect(target, timeout_seconds=CONNECT_SECONDS) as client:
        try:
            info = client.server_info()
        except deltaserve.Error as error:  # some other gRPC server, or an old deltaserve
            yield Finding(
                "protocol", str(error), "use the port of a deltaserve server, and the same version here and there"
            )
            return
        yield from _properties(info)
        if not quick:
            yield _round_trip(client)
    if not quick:
        yield _throughput(target, info.limits)


def _reachable(target: str) -> Finding:
    """Connects without gRPC, whose error does not tell a wrong name from a closed port or a firewall."""
    host, _, port = target.rpartition(":")
    begin = time.perf_counter()
    try:
        if target.startswith("unix:"):
            path = target.removeprefix("unix:")
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(path)
            return Finding("reachable", f"{path} accepts connections")
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
        return Finding("reachable", f"{target} accepts connections ({_ms(time.perf_counter() - begin)})")
    except OSError as error:
        if target.startswith("unix:"):
            text = f"nothing listens on {path}: {error.strerror}"
            advice = f"start a server there: deltaserve serve --bind {target}"
        elif isinstance(error, socket.gaierror):
            text, advice = f"the name {host} has no address", "check the spelling, or use the IP address"
        elif isinstance(error, ConnectionRefusedError):
            text = f"nothing listens on port {port} of {host}"
            advice = f"start a server there: deltaserve serve --bind {host}:{port} (0.0.0.0:{port} for other machines)"
        else:  # mostly a timeout: a host that has no server refuses, a firewall is silent
            text = f"no answer from {host} port {port}"
            advice = "look for a firewall in between, or for a server that listens on 127.0.0.1 only"
        return Finding("reachable", text, advice)


def _health(target: str) -> Finding:
    try:
        status = check(target, CONNECT_SECONDS)
    except CommandError as error:
        return Finding("health", str(error), "use the port of a deltaserve server, or read its log")
    advice = None if status == "SERVING" else "wait until it has started; if this does not change, read its log"
    return Finding("health", status, advice)


def _properties(info: "deltaserve.ServerInfo") -> Iterator[Finding]:
    """Yields what the server says about itself."""
    from deltaserve import __version__ as ours

    same = info.version.split(".")[0] == ours.split(".")[0]  # other releases speak the same protocol, deltaserve.v1
    advice = None if same else f"install the same version on both: pip install deltaserve=={info.version}"
    yield Finding("version", f"server {info.version}, here {ours}", advice)
    yield Finding("device", device(info))
    yield Finding("durable", DURABILITY.get(info.durability, info.durability))
    yield Finding("optimizers", ", ".join(info.optimizers))
    limits = info.limits
    text = f"{limits.models} models, {limits.sessions} sessions, messages up to {format_bytes(limits.message_bytes)}"
    # Clients send chunks of 1 MiB, in messages that are slightly larger.
    advice = None if limits.message_bytes > 1 << 20 else "start the server with a larger --message-bytes, such as 4MiB"
    yield Finding("limits", text, advice)
    text = f"{format_bytes(limits.memory_available_bytes)} of {format_bytes(limits.memory_bytes)} free"
    yield Finding("memory", text, FREE_MEMORY if limits.memory_available_bytes * 10 < limits.memory_bytes else None)


def _round_trip(client: "deltaserve.Client") -> Finding:
    seconds = sorted(_timed(client.server_info) for _ in range(ROUND_TRIPS))
    # Medians: one pause of either machine is no finding.
    median, p99 = statistics.median(seconds), seconds[int(0.99 * ROUND_TRIPS)]
    slow = median > SLOW_ROUND_TRIP_SECONDS
    advice = "run workers closer to the server, or compute more per step (a larger batch)" if slow else None
    return Finding("round trip", f"{_ms(median)} median, {_ms(p99)} p99 of {ROUND_TRIPS} calls", advice)


def _throughput(target: str, limits: "deltaserve.Limits") -> Finding:
    """Steps a temporary model, and measures the median rate, both directions together."""
    import numpy as np

    import deltaserve

    # Weights, state, a version that is written, one that is read, a snapshot and a push, with a margin.
    if limits.memory_available_bytes < 10 * 4 * VECTOR_ELEMENTS:
        return Finding("throughput", "not measured: the server has too little free memory", FREE_MEMORY)
    vector = np.ones(VECTOR_ELEMENTS, np.float32)
    # Not the client of the examination: a step of 16 MiB may take longer than its timeout.
    with deltaserve.connect(target, timeout_seconds=MEASURE_SECONDS) as client:
        try:
            model = client.create_model(f"doctor-{secrets.token_hex(8)}", {"vector": vector})  # a name of nobody else
            try:
                with model.worker() as worker:
                    worker.step({"vector": vector})  # not measured: the first step also pulls and opens shared memory
                    seconds = statistics.median(_timed(lambda: worker.step({"vector": vector})) for _ in range(STEPS))
            finally:
                model.delete()
        except deltaserve.Error as error:
            return Finding("throughput", str(error), "read the server's log")
    rate = 2 * vector.nbytes / 1e6 / seconds
    advice = "look for a slow network, or a busy machine at either end" if rate < SLOW_MB_PER_SECOND else None
    size = format_bytes(vector.nbytes)
    return Finding("throughput", f"{rate:.0f} MB/s in steps that send {size}, update and receive {size}", advice)


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"
