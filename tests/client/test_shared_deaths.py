"""Shared memory when a process dies, stops or forks, or runs under another user or in another namespace."""

import os
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tests.client.sharing_scene import BEGIN, BYTES, SHARES, SIZE, descriptors, free, ones, twin

import deltaserve
from deltaserve import Client
from deltaserve_server import LocalServer

if TYPE_CHECKING:
    from tests.client.conftest import Eventually, Program, StartProgram, StartServer

pytestmark = [pytest.mark.deep, pytest.mark.usefixtures("own_server")]


@pytest.fixture
def start(start_program: "StartProgram", server: LocalServer) -> "StartProgram":
    """Starts a program with a worker of model "m" of `server`."""
    return lambda source, *more: start_program(BEGIN + source, server.target, str(SIZE), *more)


# --- deaths

AT_REST = "worker.step(ones())\nprint('ready', flush=True)\ntime.sleep(60)\n"

READING = """
copy = worker._membership.transport().memory.read_weights
def slow(*arguments):
    copy(*arguments)
    print("ready", flush=True)
    time.sleep(60)
worker._membership.transport().memory.read_weights = slow
worker.step(ones())
"""

COMPARING = """
def slow(weights, target):
    copy(weights, target)
    (vector,) = worker._membership.transport().memory._weights.values()
    before = vector.copy()
    print("ready", flush=True)
    time.sleep(0.2)
    print((vector == before).all() and before.any(), flush=True)
copy, worker._membership.transport().memory.read_weights = worker._membership.transport().memory.read_weights, slow
worker.step(ones())
"""

WRITING = """
copy = worker._membership.transport().memory.write_gradient
worker.step(ones())
def slow(*arguments):
    copy(*arguments)
    print("ready", flush=True)
    time.sleep(60)
worker._membership.transport().memory.write_gradient = slow
worker.step(ones())
"""


@pytest.mark.parametrize("moment", [AT_REST, READING, WRITING], ids=["at rest", "reading", "writing"])
def test_a_worker_that_is_killed_frees_its_memory_with_its_lease(
    client: Client, start: "StartProgram", eventually: "Eventually", moment: str
) -> None:
    model = client.create_model("m", ones(0))
    before = free(client)
    program = start(SHARES + moment)
    assert program.line() == "ready", program.finish()
    assert free(client) == before - BYTES
    held = descriptors()
    program.process.kill()
    eventually(lambda: free(client) == before)
    eventually(lambda: descriptors() < held)
    assert model.info().version == 1
    with model.worker("b") as b:
        b.step(ones())


def test_a_worker_stopped_during_a_read_blocks_nobody(
    client: Client, start: "StartProgram", eventually: "Eventually"
) -> None:
    """Its version stays unchanged while other workers update; when it continues, it reads the right weights."""
    model = client.create_model("m", ones(0))
    program = start(SHARES + COMPARING)
    assert program.line() == "ready", program.finish()
    program.process.send_signal(signal.SIGSTOP)
    with model.worker("b") as b:
        for number in range(1, 8):
            b.step(ones(number))
        assert model.info().version == 8
    program.process.send_signal(signal.SIGCONT)
    assert program.line() == "True"
    assert program.finish()[0] == 0


def test_a_server_that_is_killed_leaves_nothing_behind(start_server: "StartServer", eventually: "Eventually") -> None:
    def files() -> set[str]:
        return {path.name for path in Path("/dev/shm").iterdir() if "deltaserve" in path.name}

    before = files()
    process = start_server()
    with deltaserve.connect(process.target, timeout_seconds=20) as client:
        worker = client.create_model("m", ones(0)).worker("a", transport="shared")
        for number in range(3):
            worker.step(ones(number))
        weights = worker.weights["w"].copy()
        process.kill()
        assert files() == before
        np.testing.assert_array_equal(worker.weights["w"], weights)
        process.start()
        with pytest.raises(deltaserve.StateLostError):
            worker.step(ones())
        client.create_model("m", {"w": weights})
        with client.model("m").worker("a", transport="shared") as again:
            again.step(ones())
            assert again.version == 1


# --- forks

FORK = """

client, model = connect()
worker = model.worker("a", transport="shared")
worker.step(ones())
gradient = worker._membership.transport().memory._gradient
before = gradient.copy()
if not (child := os.fork()):
    try:
        worker.step(ones(7))
    except RuntimeError as error:
        os._exit(0 if "does not survive a fork" in str(error) else 1)
    os._exit(2)
began = time.monotonic()
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), time.monotonic() - began < 5, (gradient == before).all(), flush=True)
worker.step(ones(2))
worker.close()
print(worker.version, flush=True)
"""


def test_a_forked_child_leaves_the_parents_gradient_alone(client: Client, start: "StartProgram") -> None:
    client.create_model("m", ones(0))
    program = start(FORK)
    assert program.line() == "0 True True", program.finish()
    assert program.line() == "2"
    assert program.finish()[0] == 0


# --- elsewhere

FALLS_BACK = """
client, model = connect()
worker = model.worker("a")
print(getattr(worker._membership.transport(), "memory", None) is None, flush=True)
worker.step(ones())
worker.step(ones(2))
print(worker.version, flush=True)
try:
    model.worker("b", transport="shared")
except OSError as error:
    print("OSError", flush=True)
worker.close()
client.close()
"""


def _check_falls_back(client: Client, program: "Program") -> None:
    assert [program.line() for _ in range(3)] == ["True", "2", "OSError"], program.finish()
    assert program.finish()[0] == 0
    model = client.model("m")
    assert model.info().sessions == ()
    with model.worker("c") as c:
        np.testing.assert_array_equal(c.weights["w"], twin(client, 1, 2))


@pytest.fixture
def root() -> None:
    if os.geteuid():
        pytest.skip("needs to be root")


@pytest.mark.usefixtures("root")
def test_a_worker_of_another_user_uses_messages(client: Client, start: "StartProgram") -> None:
    client.create_model("m", ones(0))
    program = start(f"os.setgroups([])\nos.setgid(65534)\nos.setuid(65534)\n{FALLS_BACK}")
    _check_falls_back(client, program)


def _unshares() -> bool:
    command = shutil.which("unshare")
    if command is None:
        return False
    tried = subprocess.run([command, "--pid", "--fork", "--mount-proc", "true"], capture_output=True, check=False)
    return not tried.returncode


UNSHARED = """
import subprocess, sys
sys.exit(subprocess.call(["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", *sys.argv[1:]]))
"""


@pytest.mark.skipif(not _unshares(), reason="needs the right to make namespaces")
def test_a_worker_with_other_process_ids_uses_messages(
    client: Client, start_program: "StartProgram", server: LocalServer
) -> None:
    """As in a separate container, the server's process id there belongs to another process or to none."""
    client.create_model("m", ones(0))
    program = start_program(UNSHARED, BEGIN + FALLS_BACK, server.target, str(SIZE))
    _check_falls_back(client, program)


# --- many


def test_ended_sessions_leak_no_descriptor_and_no_memory(client: Client, eventually: "Eventually") -> None:
    """Server and client both run in this process, so the counts cover both."""
    model = client.create_model("m", ones(0))
    with model.worker("first", transport="shared") as first:
        first.step(ones())
    sleep(0.6)
    before, held = descriptors(), free(client)
    for number in range(40):
        with model.worker(f"w{number % 3}", transport="shared") as worker:
            worker.step(ones(number))
            worker.step(ones(number))
        del worker
    eventually(lambda: free(client) == held)
    eventually(lambda: descriptors() <= before + 4)


def test_many_workers_at_once_lose_and_repeat_nothing(client: Client, eventually: "Eventually") -> None:
    model = client.create_model("m", ones(0))
    before = free(client)

    def work(number: int) -> list[int]:
        versions = []
        with model.worker(f"w{number}", transport=("shared", "auto", "stream")[number % 3]) as worker:
            for step in range(12):
                weights = worker.step(ones(step + number))["w"]
                assert np.ptp(weights) == 0, "of one version"
                assert worker.last_result is not None
                versions.append(worker.last_result.version)
        return versions

    with ThreadPoolExecutor(6) as pool:
        made = [version for versions in pool.map(work, range(6)) for version in versions]
    assert sorted(made) == list(range(1, 73))
    eventually(lambda: free(client) == before)
