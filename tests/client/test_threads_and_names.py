"""Several workers with one client, each in its own thread; and generated worker names."""

import re
import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaserve import Client, Sync
from deltaserve._model import worker_name

STEPS = 100


@pytest.mark.parametrize("size", [3, 300_000], ids=["unary", "stream"])
def test_two_workers_in_two_threads_over_one_client(client: Client, size: int) -> None:
    model = client.create_model("m", {"w": np.zeros(size)})
    steps = STEPS if size == 3 else 10

    def work(name: str) -> list[int]:
        versions = []
        with model.worker(name) as worker:
            for _ in range(steps):
                worker.step({"w": np.ones(size)})
                assert worker.last_result is not None
                versions.append(worker.last_result.version)
        return versions

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(work, ("a", "b"))
    assert sorted(one + two) == list(range(1, 2 * steps + 1)), "every push made one update, and none made two"
    assert one == sorted(one)
    assert two == sorted(two)


def test_four_workers_in_one_round_with_one_client(client: Client) -> None:
    model = client.create_model("m", {"w": np.zeros(3)}, policy=Sync(min_workers=4))

    def work(number: int) -> list[float]:
        with model.worker(f"w{number}") as worker:
            for _ in range(25):
                weights = worker.step({"w": np.full(3, float(number))})
                assert worker.last_result is not None
                assert worker.last_result.contributors == 4
            return list(weights["w"])

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(work, range(4))
    assert all(other == first for other in others)
    assert model.info().version == 25


def test_models_are_created_and_read_from_many_threads(client: Client) -> None:
    def work(number: int) -> bool:
        client.create_model(f"m{number % 4}", {"w": np.ones(5)})
        return bool((client.model(f"m{number % 4}").pull_state().weights["w"] == 1).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(40)))
    assert len(client.models()) == 4


hosts = st.one_of(
    st.text(max_size=300),
    st.sampled_from(["", ".", "-", "_._", "über.example", "a" * 500, "host name", "-a", ".b", "x\n", "\x00", "主机"]),
)


@given(host=hosts)
def test_a_generated_name_is_valid_for_any_host_name(host: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: host)
        names = {worker_name() for _ in range(5)}
    assert len(names) == 5
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name, re.ASCII), name


def test_the_server_accepts_a_generated_name(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    model = client.create_model("m", {"w": np.zeros(3)})
    for host in ("", "..ü-host.local", "-" * 200, "x" * 200):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        with model.worker() as worker:
            assert model.info().sessions[0].worker == worker.name
