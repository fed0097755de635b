"""When a failed attempt is retried, and how the channel is opened."""

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2
from hypothesis import given
from hypothesis import strategies as st

import deltaserve
from deltaserve import Error, UnavailableError
from deltaserve._connection import Connection
from deltaserve._credentials import Plaintext
from deltaserve._retry import AttemptFailed, RetryPolicy
from deltaserve_server import LocalServer

POLICY = RetryPolicy(budget_seconds=1.0)
CAREFUL = RetryPolicy(budget_seconds=1.0, repeats_uncertain=False)

reasons = st.sampled_from([None, "RECOVERING", "SESSION_LIMIT", "DRAINING", "STORAGE_UNAVAILABLE"])


def failed(reason: str | None, retry_after_seconds: float | None) -> AttemptFailed:
    return AttemptFailed(UnavailableError("no", reason=reason), retry_after_seconds)


@given(reasons, st.floats(0, 10), st.integers(0, 2000), st.booleans())
def test_the_backoff_is_bounded_and_at_least_what_the_server_asks_for(
    reason: str | None, asked: float, repeats: int, delivered: bool
) -> None:
    wait = POLICY.wait_seconds(failed(reason, asked), repeats, delivered=delivered)
    assert wait is not None
    limit = 0.5 if reason in (None, "RECOVERING") else 5.0
    assert asked <= wait <= max(asked, min(0.1 * 2 ** min(repeats, 10), limit))


@given(reasons, st.integers(0, 20), st.booleans())
def test_a_failure_that_cannot_be_retried_is_final(reason: str | None, repeats: int, delivered: bool) -> None:
    assert POLICY.wait_seconds(failed(reason, None), repeats, delivered=delivered) is None


@pytest.mark.parametrize("reason", [None, "DRAINING", "STORAGE_UNAVAILABLE", "SESSION_LIMIT", "RECOVERING"])
@pytest.mark.parametrize("delivered", [False, True])
def test_a_call_that_is_not_idempotent_is_not_retried_if_it_may_have_arrived(
    reason: str | None, delivered: bool
) -> None:
    uncertain = delivered and reason in (None, "DRAINING", "STORAGE_UNAVAILABLE")
    assert (CAREFUL.wait_seconds(failed(reason, 0.0), 0, delivered=delivered) is None) == uncertain


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "5", None])
def test_a_timeout_is_a_finite_number_above_zero(seconds: Any) -> None:
    with pytest.raises(ValueError, match="timeout_seconds: expected a finite number above 0, got"):
        deltaserve.connect("localhost:1", timeout_seconds=seconds)


def test_credentials_open_the_channel(server: LocalServer) -> None:
    class Recorded(Plaintext):
        target = ""

        def open_channel(self, target: str, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
            self.target = target
            assert ("grpc.enable_retries", 0) in options
            return super().open_channel(target, options)

    credentials = Recorded()
    with deltaserve.connect(server.target, credentials=credentials) as client:
        assert client.models() == []
    assert credentials.target == server.target


class _Malformed(grpc.RpcError):
    """The error of a peer whose status details are not what their type says."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.NOT_FOUND

    def details(self) -> str:
        return "no such page"

    def trailing_metadata(self) -> Any:
        status = status_pb2.Status(code=5, message=self.details())
        status.details.add(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff")
        return [("grpc-status-details-bin", status.SerializeToString())]


def test_a_peer_with_malformed_details_gets_an_error_and_no_endless_wait() -> None:
    def attempt(seconds: float) -> None:
        raise _Malformed

    with closing(Connection("localhost:1", 5.0)) as connection, pytest.raises(Error, match="no such page"):
        connection.retry(attempt)
