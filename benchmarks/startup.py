"""The time until a server serves, and the time to import the client."""

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from time import perf_counter, sleep

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

import deltaserve
from benchmarks.results import Timings
from benchmarks.timing import collect

SERVING, STEPPED, IMPORT = "server process to SERVING", "server process to a first step", "import deltaserve"
_PYTHON = "python -c pass"

_PATIENCE_SECONDS = 60.0
_IMPORT = "from time import perf_counter as now; start = now(); import {}; print(now() - start)"


def startup(rounds: int) -> Timings:
    """Times starts and imports; the warm-up rounds have read the files from the disk."""
    contenders: dict[str, Callable[[], float]] = {
        SERVING: start_seconds,
        STEPPED: partial(start_seconds, until=_stepped),
        IMPORT: partial(import_seconds, "deltaserve"),
        "import grpc, numpy": partial(import_seconds, "grpc, numpy"),
        _PYTHON: _python,
    }
    return Timings("startup: of the server, and import", _PYTHON, collect(contenders, rounds))


@contextmanager
def server_process(environment: Mapping[str, str] | None = None) -> Iterator[tuple[str, int]]:
    """Yields the address and the process id of a `deltaserve serve` that listens; it ends with the context.

    Args:
        environment: The process's environment; None means this process's own.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        target = f"127.0.0.1:{free.getsockname()[1]}"
    options = ["--bind", target, "--device", "cpu", "--log-level", "warning"]
    command = [sys.executable, "-P", "-m", "deltaserve", "serve", *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as child:
        try:
            listening(target, child)
            yield target, child.pid
        finally:
            child.terminate()


def start_seconds(environment: Mapping[str, str] | None = None, until: Callable[[str], None] | None = None) -> float:
    """Returns the seconds from the start of a server process until `until` returns.

    Args:
        environment: The process's environment; None means this process's own.
        until: Takes the target; None waits for health SERVING.
    """
    started = perf_counter()
    with server_process(environment) as (target, _):
        (until or _serving)(target)
        return perf_counter() - started


def listening(target: str, child: "subprocess.Popen[bytes]") -> None:
    """Returns when a server listens. gRPC itself would wait a second between two attempts.

    Raises:
        RuntimeError: The process has ended instead.
    """
    host, _, port = target.rpartition(":")
    while child.poll() is None:
        try:
            with socket.create_connection((host, int(port))):
                return
        except ConnectionError:  # not listening yet; a listener in the making may reset a connection
            sleep(0.001)
    raise RuntimeError(f"the server ended with status {child.returncode}")


def _serving(target: str) -> None:
    with grpc.insecure_channel(target) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        while check(health_pb2.HealthCheckRequest(), timeout=_PATIENCE_SECONDS).status != _is_serving:
            sleep(0.001)


_is_serving = health_pb2.HealthCheckResponse.ServingStatus.SERVING


def _stepped(target: str) -> None:
    tensors = {"w": np.zeros(6, np.float32)}
    with deltaserve.connect(target) as client, client.create_model("bench", tensors).worker() as worker:
        worker.step(tensors)


def import_seconds(names: str, environment: Mapping[str, str] | None = None) -> float:
    """Returns the seconds of an import in a new process, without the start of the interpreter."""
    command = [sys.executable, "-P", "-c", _IMPORT.format(names)]
    return float(subprocess.check_output(command, text=True, env=environment))


def _python() -> float:
    started = perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return perf_counter() - started
