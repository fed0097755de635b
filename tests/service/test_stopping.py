"""A server that is told to stop stops, whatever hangs."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from messages import creation
from wire import Wire

from deltaserve_server import LocalServer, ServerConfig, app
from deltaserve_server.engine.model_engine import ModelEngine

REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
GARBAGE = b"\xff\xff\xff"


@contextmanager
def _process(**environment: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """Runs `deltaserve serve` in a process; gives it and its target."""
    command = [sys.executable, "-c", "from deltaserve_server.cli import main; main()", "serve"]
    process = subprocess.Popen(
        [*command, "--bind", "127.0.0.1:0", "--device", "cpu", "--grace-seconds", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    try:
        assert process.stdout
        lines = iter(process.stdout.readline, "")
        target = next(found[1] for line in lines if (found := re.search(r'connect\("(.*?)"\)', line)))
        yield process, target
    finally:
        process.kill()
        process.communicate()


def _garbage(target: str, path: str) -> grpc.StatusCode:
    """Sends what is no message to a method of two streams; returns the status of the call."""
    with grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        begin: Any = channel.stream_stream(path, None, None)
        call = begin(iter([GARBAGE]), timeout=20)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    code: grpc.StatusCode = caught.value.code()
    return code


def test_a_server_that_got_garbage_for_reflection_stops_and_says_nothing_of_it() -> None:
    """gRPC decodes the messages of libraries' services, and may never end a call whose stream it cannot decode."""
    with _process() as (process, target):
        for _ in range(2):
            assert _garbage(target, REFLECTION) is grpc.StatusCode.INVALID_ARGUMENT
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
        assert process.returncode == 0
        assert "Traceback" not in err
        assert "gave up" not in err


def test_a_call_that_grpc_never_ends_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(app, "_GIVE_UP_SECONDS", 0.2)
    monkeypatch.setattr(app, "_GRPC_GRACE_SECONDS", 0.0)
    server = LocalServer()
    server.start()
    really_stop = server._grpc.stop

    def stop(grace: float | None) -> threading.Event:
        really_stop(grace)
        return threading.Event()

    monkeypatch.setattr(server._grpc, "stop", stop)
    assert server.stop(0.0)
    assert server.abandoned == ["calls that did not end when they were cancelled"]
    assert "stopping: gave up waiting for calls that did not end when they were cancelled" in caplog.messages
    server.wait()


def test_a_fault_in_the_last_snapshot_of_a_model_costs_no_other_model_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    really_close, closed = ModelEngine.close, []

    def close(engine: ModelEngine) -> None:
        if engine.machine.name == "a":
            raise MemoryError
        really_close(engine)
        closed.append(engine.machine.name)

    monkeypatch.setattr(ModelEngine, "close", close)
    with LocalServer(ServerConfig(device="cpu", data_dir=tmp_path)) as server, Wire(server.target) as wire:
        for name in "ab":
            wire.create(name)
        assert not server.stop(0.0)
    assert closed == ["b"]
    assert "model a: the last snapshot failed" in caplog.text


def test_a_thread_that_hangs_in_a_call_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_GIVE_UP_SECONDS", 0.2)
    monkeypatch.setattr(app, "_GRPC_GRACE_SECONDS", 0.0)
    hangs, go_on = threading.Event(), threading.Event()
    server = LocalServer()

    def hang(request: bytes, _: grpc.ServicerContext) -> bytes:
        hangs.set()
        go_on.wait(20)
        return request

    handlers: dict[str, Any] = {"Hang": grpc.unary_unary_rpc_method_handler(hang)}
    server._grpc.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Hangs", handlers)])
    server.start()
    with grpc.insecure_channel(server.target) as channel:
        begin: Any = channel.unary_unary("/test.Hangs/Hang", None, None)
        call = begin.future(b"", timeout=20)  # dropped, it would be cancelled
        assert hangs.wait(20)
        server.stop(0.0)
        assert call.done()
    assert "threads of calls" in server.abandoned
    go_on.set()


def test_a_stop_that_waits_for_the_disk_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said, server = threading.Event(), LocalServer()
    monkeypatch.setattr(app, "_NOTICE_SECONDS", 0.01)
    really_stop = server._catalog.stop

    def stop() -> bool:
        assert said.wait(20)
        return really_stop()

    class Listens(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "a second signal gives them up" in record.getMessage():
                said.set()

    monkeypatch.setattr(server._catalog, "stop", stop)
    listens = Listens()
    logging.getLogger(app.__name__).addHandler(listens)
    try:
        server.start()
        assert server.stop(0.0)
        assert not server.abandoned
    finally:
        logging.getLogger(app.__name__).removeHandler(listens)


@pytest.mark.deep
def test_a_process_whose_call_hangs_exits() -> None:
    """The interpreter would wait for the thread of the call; the process waits some seconds and exits."""
    with _process(DELTASERVE_FAILPOINTS="push.headers=sleep(100)") as (process, target), Wire(target) as wire:
        wire.one("CreateModel", *creation("m"), seconds=100.0)  # a new process loads the kernels first
        session = wire.open("m", "a")
        hanging = threading.Thread(target=lambda: _ignored(wire, session.header(1)), daemon=True)
        hanging.start()
        hanging.join(1.0)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "gave up waiting for threads of calls" in err


def _ignored(wire: Wire, header: Any) -> None:
    with pytest.raises(grpc.RpcError):
        wire.step(header, np.ones(5))
