"""The lineage of a model: KeepSession tells it, and a push on weights of another one is refused."""

from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from wire import Session, Wire, refusal, unchanged

from deltaserve.v1.worker_service_pb2 import StepRequest
from deltaserve_server import LocalServer

OTHER = b"of another server"


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    with LocalServer() as server, Wire(server.target) as plain:
        plain.create("m")
        yield plain


@pytest.fixture
def session(wire: Wire, request: pytest.FixtureRequest) -> Session:
    return wire.open("m", request.node.name[:100].replace("[", "-").replace("]", ""))


def test_keep_session_tells_what_open_session_told(wire: Wire, session: Session) -> None:
    kept = wire.keep(session)
    assert len(kept.lineage) == 16
    assert kept.lineage == session.opened.lineage
    assert list(kept.ancestors) == list(session.opened.ancestors)


def test_a_push_of_another_lineage_is_refused_and_its_number_stays_free(wire: Wire, session: Session) -> None:
    with unchanged(wire, "m"):
        # Before all else: this push has no session, number or gradient that would do.
        header = session.header(0, lineage=OTHER)
        header.session_id = b""
        refused = wire.refused("Step", StepRequest(header=header, gradient=b"x"))
        assert (refused.reason, refused.metadata) == ("LINEAGE_CHANGED", {"model": "m"})
        with pytest.raises(grpc.RpcError) as caught:
            wire.stream_step(session.header(1, lineage=OTHER), [(0, np.ones(5))])
        assert refusal(caught.value).reason == "LINEAGE_CHANGED"
    assert not wire.step(session.header(1, lineage=session.opened.lineage), np.ones(5)).result.duplicate


def test_a_push_without_a_lineage_is_not_checked(wire: Wire, session: Session) -> None:
    before = wire.model("m").position.version
    assert wire.step(session.header(1), np.ones(5)).position.version == before + 1
