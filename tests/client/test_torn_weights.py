"""A worker never pushes a gradient computed on weights that it received only in part."""

from typing import TYPE_CHECKING

import numpy as np
import pytest

import deltaserve
from deltaserve import Client
from deltaserve._common.element_types import ElementType
from deltaserve._common.flat_vector import FlatVector

if TYPE_CHECKING:
    from tests.client.conftest import StartProxy

SIZE = 700_000  # three chunks
ONES = {"w": np.ones(SIZE)}


@pytest.fixture
def workers(client: Client) -> tuple[deltaserve.Worker, deltaserve.Worker]:
    model = client.create_model("m", {"w": np.zeros(SIZE)})
    return model.worker("a", transport="stream"), model.worker("b", transport="stream")


def interrupt_second_chunk(patch: pytest.MonkeyPatch) -> None:
    """Raises KeyboardInterrupt while the second chunk is written."""
    write = FlatVector.write

    def interrupted(self: FlatVector, offset: int, data: memoryview, wire: ElementType) -> None:
        if offset:
            raise KeyboardInterrupt
        write(self, offset, data, wire)

    patch.setattr(FlatVector, "write", interrupted)


def pulled_in_part(
    workers: tuple[deltaserve.Worker, deltaserve.Worker], monkeypatch: pytest.MonkeyPatch
) -> deltaserve.Worker:
    """Returns a worker whose weights are partly of version 1 and partly of version 0."""
    a, b = workers
    a.pull()
    b.step(ONES)
    with monkeypatch.context() as patch:
        interrupt_second_chunk(patch)
        with pytest.raises(KeyboardInterrupt):
            a.pull()
    return a


def test_after_an_interrupted_pull_the_next_step_refuses_and_repairs(
    workers: tuple[deltaserve.Worker, deltaserve.Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    a = pulled_in_part(workers, monkeypatch)
    with pytest.raises(deltaserve.ConflictError, match="arrived in part only"):
        a.step(ONES)
    assert np.ptp(a.weights["w"]) == 0
    a.step(ONES)
    assert a.last_result is not None
    assert (a.last_result.version, a.last_result.staleness) == (2, 0)


def test_a_gradient_of_torn_weights_does_not_replace_a_push_that_never_arrived(
    workers: tuple[deltaserve.Worker, deltaserve.Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = workers
    a.pull()
    with monkeypatch.context() as patch:

        def unreachable(method: str, *_: object, **__: object) -> None:
            raise deltaserve.UnavailableError(f"{method}: cannot reach a server")

        patch.setattr(a._connection, "receive", unreachable)
        with pytest.raises(deltaserve.UnavailableError):
            a.step(ONES)
    b.step(ONES)
    with monkeypatch.context() as patch:
        interrupt_second_chunk(patch)
        with pytest.raises(KeyboardInterrupt):
            a.pull()
    with pytest.raises(deltaserve.StaleGradientError, match="arrived in part only"):
        a.step({"w": np.full(SIZE, 2.0)})
    a.step({"w": np.full(SIZE, 2.0)})
    assert a.last_result is not None
    assert (a.last_result.version, a.last_result.staleness) == (2, 0)


def test_after_interrupted_weights_the_same_gradient_is_found_and_another_refused(
    workers: tuple[deltaserve.Worker, deltaserve.Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _ = workers
    a.pull()
    for version, gradient in ((1, ONES), (2, {"w": np.full(SIZE, 2.0)})):
        with monkeypatch.context() as patch:
            interrupt_second_chunk(patch)
            with pytest.raises(KeyboardInterrupt):
                a.step(ONES)
        if version == 1:
            a.step(gradient)
            assert a.last_result is not None
            assert (a.last_result.version, a.last_result.duplicate) == (1, True)
        else:
            with pytest.raises(deltaserve.ConflictError, match="arrived in part only"):
                a.step(gradient)
        assert a.version == version
        assert np.ptp(a.weights["w"]) == 0


def test_torn_weights_are_pulled_again_before_they_are_returned(
    workers: tuple[deltaserve.Worker, deltaserve.Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    a = pulled_in_part(workers, monkeypatch)
    assert np.ptp(a.weights["w"]) == 0
    assert a.version == 1


def test_a_refused_retry_leaves_the_weights_whole(client: Client, start_proxy: "StartProxy") -> None:
    """The worker first asks for the status of the session, and that answer contains no weights."""
    client.create_model("m", {"w": np.zeros(SIZE)})
    proxy, bad = start_proxy(client.target), np.ones(SIZE)
    bad[-1] = np.nan
    with deltaserve.connect(proxy.target, timeout_seconds=20) as far:
        worker = far.model("m").worker("a", transport="stream")
        worker.pull()
        proxy.cut_after("up", 1 << 20)
        with pytest.raises(deltaserve.RequestError, match="NaN"):
            worker.step({"w": bad})
        assert proxy.cuts == 1
        worker.step(ONES)
        assert worker.version == 1
