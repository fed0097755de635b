"""When a killed server comes back without its models, workers raise an error that says what is lost."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import sleep
from typing import TYPE_CHECKING

import numpy as np
import pytest

import deltaserve
from deltaserve import Sync, Worker

if TYPE_CHECKING:
    from tests.client.conftest import Eventually, StartProgram, StartServer

pytestmark = pytest.mark.deep

ONE = {"w": np.ones(3, np.float32)}

CALLS: list[Callable[[Worker], object]] = [lambda worker: worker.pull(), lambda worker: worker.step(ONE)]

LOST = re.escape(
    "was restarted and has lost model digits: its weights and state of version 2 were not durable (2 updates)"
)


def test_a_step_and_a_pull_report_what_is_lost(start_server: "StartServer") -> None:
    server = start_server()
    with deltaserve.connect(server.target, timeout_seconds=20) as client:
        worker = client.create_model("digits", ONE).worker("a")
        for _ in range(2):
            worker.step(ONE)
        kept = {name: values.copy() for name, values in worker.weights.items()}
        server.kill()
        server.start()
        for call in CALLS:
            with pytest.raises(deltaserve.StateLostError, match=LOST) as caught:
                call(worker)
            assert server.target in str(caught.value)
            assert caught.value.reason == "MODEL_NOT_FOUND"
        np.testing.assert_array_equal(worker.weights["w"], kept["w"])
        worker.close()


@pytest.mark.parametrize("further", [0, 5], ids=["behind", "ahead"])
def test_a_recreated_model_is_not_mistaken_for_the_old_one(start_server: "StartServer", further: int) -> None:
    """The version of the new model may be lower or higher than the worker's."""
    server = start_server()
    with deltaserve.connect(server.target, timeout_seconds=20) as client:
        worker = client.create_model("digits", ONE).worker("a")
        for _ in range(2):
            worker.step(ONE)
        kept = worker.weights["w"].copy()
        server.kill()
        server.start()
        with client.create_model("digits", {"w": np.zeros(3)}).worker("b") as other:
            for _ in range(further):
                other.step(ONE)
            for call in CALLS:
                with pytest.raises(deltaserve.StateLostError, match=LOST):
                    call(worker)
        np.testing.assert_array_equal(worker.weights["w"], kept, "its own weights are what it can start again from")
        worker.close()


def test_a_worker_waiting_in_a_round_learns_of_the_loss(start_server: "StartServer", eventually: "Eventually") -> None:
    server = start_server()
    with deltaserve.connect(server.target, timeout_seconds=20) as client, ThreadPoolExecutor(1) as pool:
        model = client.create_model("digits", ONE, policy=Sync(min_workers=2))
        worker = model.worker("a")
        step = pool.submit(worker.step, ONE)
        eventually(lambda: model.info().sessions[0].waiting)
        server.kill()
        server.start()
        with pytest.raises(deltaserve.StateLostError, match="of version 0 were not durable"):
            step.result()
        worker.close()


def test_an_expired_lease_is_not_reported_as_lost_state(client: deltaserve.Client) -> None:
    """The server kept running; only the worker paused for longer than its lease."""
    worker = client.create_model("digits", ONE).worker("a", lease_seconds=1.0)
    worker._session._closed.put(None)  # stops the renewals, as if the process had been stopped
    sleep(1.8)
    worker.step(ONE)
    assert worker.last_result
    assert worker.last_result.version == 1


TRAIN = """
import sys
import numpy as np
import deltaserve

with deltaserve.connect(sys.argv[1], timeout_seconds=20) as client:
    with client.create_model("digits", {"w": np.ones(3)}).worker() as worker:
        while True:
            worker.step({"w": np.ones(3)})
            print(worker.version, flush=True)
"""


def test_a_training_program_fails_with_that_message(start_server: "StartServer", start_program: "StartProgram") -> None:
    server = start_server()
    program = start_program(TRAIN, server.target)
    while program.line() != "20":
        pass
    server.kill()
    server.start()
    status, _, errors = program.finish()
    assert status == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith("deltaserve._errors.StateLostError: the server at ")
    assert "was restarted and has lost model digits" in last
