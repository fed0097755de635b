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
ROUND_TRIPS = 100
SLOW_ROUND_TRIP_SECONDS = 0.005
SLOW_MB_PER_SECOND = 100.0
VECTOR_ELEMENTS = 4 << 20
STEPS = 5
Quick = Annotated[bool, typer.Option("--quick", help="Skip the measurements.")]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: What was examined.
        text: What was found.
        advice: What to do about a problem; None means that there is none.
    """

    name: str
    text: str
    advice: str | None = None


class FatalFinding(Exception):
    """A problem that prevents the rest of the examination."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.text)
        self.finding = finding


def doctor(target: TargetArgument = DEFAULT_TARGET, quick: Quick = False) -> None:
    """Examine a server from this machine: connection, version, limits, latency, throughput.

    To measure throughput it creates a model of 16 MiB under a random name and deletes it.
    """
    problems = 0
    try:
        for finding in examine(target, quick):
            problems += _show(finding)
    except FatalFinding as fatal:
        problems += _show(fatal.finding)
    if problems:
        raise CommandError(f"{problems} problem{'s' * (problems > 1)} found, see above")


def examine(target: str, quick: bool) -> Iterator[Finding]:
    """Yields each finding as soon as it is made.

    Raises:
        FatalFinding: The rest cannot be examined.
    """
    import deltaserve

    yield _reachable(target)
    yield _health(target)
    with deltaserve.connect(target, timeout_seconds=CONNECT_SECONDS) as client:
        try:
            info = client.server_info()
        except deltaserve.Error as error:
            advice = "use the port of a deltaserve server, and the same version here and there"
            raise FatalFinding(Finding("protocol", str(error), advice)) from error
        yield _version(info)
        yield Finding("device", device(info))
        yield Finding("durable", DURABILITY.get(info.durability, info.durability))
        yield _limits(info.limits)
        yield _memory(info.limits)
        if not quick:
            yield _round_trip(client)
    if not quick:
        yield _throughput(target, info.limits)


def _show(finding: Finding) -> bool:
    """Prints a finding; returns whether it is a problem."""
    is_problem = finding.advice is not None
    mark = typer.style("look", fg="red", bold=True) if is_problem else typer.style("ok  ", fg="green")
    typer.echo(f"{mark}  {finding.name:<11} {finding.text}")
    if is_problem:
        typer.echo(f"      {'':<11} -> {finding.advice}")
    return is_problem


def _reachable(target: str) -> Finding:
    if target.startswith("unix:"):
        return _reachable_socket(target.removeprefix("unix:"))
    host, _, port = target.rpartition(":")
    begin = time.perf_counter()
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise FatalFinding(_unreachable(host, port, error)) from error
    return Finding("reachable", f"{target} accepts connections ({_ms(time.perf_counter() - begin)})")


def _reachable_socket(path: str) -> Finding:
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(path)
    except OSError as error:
        advice = f"start a server there: deltaserve serve --bind unix:{path}"
        raise FatalFinding(Finding("reachable", f"nothing listens on {path}: {error.strerror}", advice)) from error
    return Finding("reachable", f"{path} accepts connections")


def _unreachable(host: str, port: str, error: OSError) -> Finding:
    if isinstance(error, socket.gaierror):
        text, advice = f"the name {host} has no address", "check the spelling, or use the IP address"
    elif isinstance(error, ConnectionRefusedError):
        text = f"nothing listens on port {port} of {host}"
        advice = f"start a server there: deltaserve serve --bind {host}:{port} (0.0.0.0:{port} for other machines)"
    else:
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


def _version(info: "deltaserve.ServerInfo") -> Finding:
    from deltaserve import __version__ as ours

    text = f"server {info.version}, here {ours}"
    if info.version.split(".")[0] == ours.split(".")[0]:
        return Finding("version", text)
    return Finding("version", text, f"install the same version on both: pip install deltaserve=={info.version}")


def _limits(limits: "deltaserve.Limits") -> Finding:
    text = f"{limits.models} models, {limits.sessions} sessions, messages up to {format_bytes(limits.message_bytes)}"
    # Clients send chunks of 1 MiB, in messages that are slightly larger.
    advice = None if limits.message_bytes > 1 << 20 else "start the server with a larger --message-bytes, such as 4MiB"
    return Finding("limits", text, advice)


def _memory(limits: "deltaserve.Limits") -> Finding:
    text = f"{format_bytes(limits.memory_available_bytes)} of {format_bytes(limits.memory_bytes)} free"
    if limits.memory_available_bytes * 10 >= limits.memory_bytes:
        return Finding("memory", text)
    return Finding("memory", text, "delete models, or start the server with a larger --memory-bytes")


def _round_trip(client: "deltaserve.Client") -> Finding:
    seconds = sorted(_timed(client.server_info) for _ in range(ROUND_TRIPS))
    median, p99 = statistics.median(seconds), seconds[int(0.99 * ROUND_TRIPS)]
    slow = median > SLOW_ROUND_TRIP_SECONDS
    advice = "run workers closer to the server, or compute more per step (a larger batch)" if slow else None
    return Finding("round trip", f"{_ms(median)} median, {_ms(p99)} p99 of {ROUND_TRIPS} calls", advice)


def _throughput(target: str, limits: "deltaserve.Limits") -> Finding:
    import deltaserve

    # Weights, state, a version that is written, one that is read, a snapshot and a push, with a margin.
    if limits.memory_available_bytes < 10 * 4 * VECTOR_ELEMENTS:
        text = "not measured: the server has too little free memory"
        return Finding("throughput", text, "delete models, or start the server with a larger --memory-bytes")
    with deltaserve.connect(target, timeout_seconds=MEASURE_SECONDS) as client:
        try:
            rate = _megabytes_per_second(client)
        except deltaserve.Error as error:
            return Finding("throughput", str(error), "read the server's log")
    slow = rate < SLOW_MB_PER_SECOND
    advice = "look for a slow network, or a busy machine at either end" if slow else None
    size = format_bytes(4 * VECTOR_ELEMENTS)
    text = f"{rate:.0f} MB/s in steps that send {size}, update and receive {size}"
    return Finding("throughput", text, advice)


def _megabytes_per_second(client: "deltaserve.Client") -> float:
    """Steps a temporary model; returns the median rate, both directions together."""
    import numpy as np

    vector = np.ones(VECTOR_ELEMENTS, np.float32)
    model = client.create_model(f"doctor-{secrets.token_hex(8)}", {"vector": vector})
    try:
        with model.worker() as worker:
            worker.step({"vector": vector})
            seconds = statistics.median(_timed(lambda: worker.step({"vector": vector})) for _ in range(STEPS))
    finally:
        model.delete()
    return 2 * vector.nbytes / 1e6 / seconds


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"
