"""The table of errors, row by row: what each refusal carries, and that it changes nothing.

The tests hold the table in the client, the comments in the proto and the cases here equal.
"""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import error_cases_input  # noqa: F401  # they add to CASES
import error_cases_optimizer  # noqa: F401
import error_cases_policy  # noqa: F401
import error_cases_state  # noqa: F401
import grpc
import pytest
from error_scene import CASES, CONFIG, Case, Scene
from reused_server import ReusedServers
from wire import Wire, refusal, unchanged

import deltaserve
from deltaserve._common.error_table import DOMAIN, TABLE, from_call
from deltaserve._errors import Error
from deltaserve.v1.errors_pb2 import ErrorReason

PREFIX = "ERROR_REASON_"
PROTO = Path(__file__).parents[2] / "proto/deltaserve/v1/errors.proto"


@pytest.fixture
def scene(reused_servers: ReusedServers, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    with (
        reused_servers.serving(CONFIG) as server,
        Wire(server.target) as wire,
        ThreadPoolExecutor() as threads,
    ):
        wire.create("m")
        a = wire.open("m", "a")
        for sequence in (1, 2):
            wire.step(a.header(sequence), [1.0] * 5)
        scene = Scene(wire, server, monkeypatch, threads, a)
        yield scene
        monkeypatch.undo()
        if scene.pending:  # it drains until the push that waits is given up
            with suppress(grpc.RpcError):
                wire.delete("s")
            reused_servers.stop(CONFIG)


def _described() -> dict[str, tuple[str, frozenset[str]]]:
    """Returns code and metadata keys by reason, as the comments in the proto state them."""
    found = {}
    comment = ""
    for line in PROTO.read_text().split("enum ErrorReason {")[1].splitlines():
        text = line.strip()
        value = re.match(rf"{PREFIX}(\w+) = (\d+);", text)
        if text.startswith("//"):
            comment += " " + text.removeprefix("//").strip()
        elif value:
            head = re.match(r" ([A-Z_]+) \{([a-z, ]*)\}:", comment)
            if head:
                found[value[1]] = head[1], frozenset(filter(None, head[2].split(", ")))
            comment = ""
    return found


def test_every_reason_of_the_proto_has_a_row_and_a_case() -> None:
    reasons = {value.name.removeprefix(PREFIX) for value in ErrorReason.DESCRIPTOR.values} - {"UNSPECIFIED"}
    assert reasons == set(TABLE)
    assert reasons == set(_described())
    assert reasons == {case.reason for case in CASES}


def test_codes_and_metadata_are_those_of_the_proto() -> None:
    assert {reason: (row.code.name, row.keys) for reason, row in TABLE.items()} == _described()


def test_every_exception_is_public() -> None:
    kinds = {row.exception for row in TABLE.values()} | {deltaserve.RolledBackError}
    assert all(getattr(deltaserve, kind.__name__) is kind and kind.__name__ in deltaserve.__all__ for kind in kinds)
    assert kinds == set(_below(Error))


def _below(kind: type[Error]) -> Iterator[type[Error]]:
    for lower in kind.__subclasses__():
        yield lower
        yield from _below(lower)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_refusal_matches_the_table_and_changes_nothing(case: Case, scene: Scene) -> None:
    row = TABLE[case.reason]
    method, messages = case.prepare(scene)
    with unchanged(scene.wire, *scene.models):
        try:
            answered = scene.wire.call(method, *messages)
        except grpc.RpcError as failed:
            error = failed
        else:
            pytest.fail(f"{method} answered {answered}")
        refused = refusal(error)
    assert (refused.reason, refused.code, refused.domain) == (case.reason, row.code, DOMAIN)
    assert refused.metadata.keys() == row.keys
    assert refused.metadata == refused.metadata | dict(case.metadata)
    assert refused.text == row.text.format_map(refused.metadata)
    assert refused.text.isprintable()
    assert (refused.retry_seconds is not None) == case.retry
    named = "field" in row.keys and row.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.fields == ((refused.metadata["field"],) if named else ())
    raised, retry_seconds = from_call(error, scene.wire.target, 1.0)
    assert type(raised) is row.exception
    assert (raised.reason, raised.metadata, str(raised)) == (refused.reason, refused.metadata, refused.text)
    assert retry_seconds == refused.retry_seconds
