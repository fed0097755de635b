"""If the answer to a push is lost and its round fails, the push does not count and its number is free."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

import deltaserve
from deltaserve import Client, Sync, UnavailableError

if TYPE_CHECKING:
    from tests.client.conftest import Eventually, GiveUp


def gradient(value: float) -> dict[str, np.ndarray]:
    return {"w": np.full(3, value, np.float32)}


@pytest.mark.parametrize("late", [False, True], ids=["alone", "with one who waits for the next round"])
def test_the_worker_continues_with_another_gradient(
    late: bool, client: Client, give_up: "GiveUp", eventually: "Eventually"
) -> None:
    patient = Sync(min_workers=2)
    model = client.create_model("m", gradient(0), policy=patient)
    with model.worker("c") as c, model.worker("a") as a, ThreadPoolExecutor() as threads:
        c.pull()
        give_up(a, gradient(1))
        if late:
            model.worker("d").close()  # it belongs to the next round
        model.update(policy=replace(patient, round_timeout_seconds=1.0))
        with pytest.raises(UnavailableError) as caught:
            a.step(gradient(2))  # waits until the first push has failed, then for a new round
        assert caught.value.reason == "ROUND_FAILED"
        model.update(policy=patient)
        resumed = threads.submit(a.step, gradient(2))
        eventually(lambda: any(session.waiting for session in model.info().sessions))
        c.step(gradient(4))
        resumed.result()
        assert a.last_result
        assert a.last_result.contributors == 2
    assert model.pull_state().update_counts == {"w": 1}


def test_a_replaced_worker_does_not_fence_its_replacement(client: Client, eventually: "Eventually") -> None:
    model = client.create_model("m", gradient(0))
    with model.worker("a", lease_seconds=1.0) as stopped:
        stopped.step(gradient(1))
        stopped._session._closed.put(None)
        eventually(lambda: not model.info().sessions)
        with model.worker("a") as replacement:
            replacement.step(gradient(1))
            with pytest.raises(deltaserve.SessionError) as caught:
                stopped.step(gradient(2))
            assert caught.value.reason == "SESSION_FENCED"
            replacement.step(gradient(3))
            assert model.info().version == 3
