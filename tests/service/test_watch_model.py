"""WatchModel: every version once and in order, slow watchers, and how a watch ends."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

import grpc
import numpy as np
import pytest
from expected import gradient, norm
from messages import adadelta, asynchronous, bounded, sync
from reused_server import ReusedServers
from wire import Session, Watch, Wire, eventually, streamed

from deltaserve.v1.common_pb2 import Policy
from deltaserve.v1.model_service_pb2 import WatchModelResponse
from deltaserve_server import LocalServer, ServerConfig

SIZE = 5
WATCHERS = 3


@pytest.fixture
def small(reused_servers: ReusedServers) -> Iterator[Wire]:
    """A server that takes few watchers."""
    config = ServerConfig(bind="127.0.0.1:0", device="cpu", sessions=4, watchers=WATCHERS)
    with reused_servers.serving(config) as server, Wire(server.target) as wire:
        yield wire


def _put(wire: Wire, model: str) -> None:
    """Replaces the state by zeros."""
    wire.put(model, [np.zeros(SIZE)] * 3)


def _advance(wire: Wire, session: Session, numbers: Sequence[int]) -> None:
    for number in numbers:
        wire.step(session.header(number), gradient(number, SIZE))


def _contributions(event: WatchModelResponse) -> list[tuple[str, int, int, int, float]]:
    return [(c.worker, c.epoch, c.sequence, c.staleness, c.weight) for c in event.update.contributions]


def test_the_first_message_tells_where_the_model_stands(wire: Wire) -> None:
    wire.create("m")
    session = wire.open("m", "a")
    for version in range(3):
        watch = wire.watch("m")
        first = watch.next()
        assert first.position == wire.model("m").position
        assert (first.position.version, first.HasField("update"), first.missed) == (version, False, 0)
        watch.cancel()
        wire.step(session.header(version + 1), gradient(version, SIZE))


def test_every_watcher_gets_every_version_once_and_in_order(wire: Wire) -> None:
    wire.create("m")
    session = wire.open("m", "a")
    watches = [wire.watch("m") for _ in range(3)]
    for watch in watches:
        watch.next()
    _advance(wire, session, range(1, 101))
    seen = [watch.until(100) for watch in watches]
    assert [event.position.version for event in seen[0]] == list(range(1, 101))
    assert {event.missed for event in seen[0]} == {0}
    assert seen[0] == seen[1] == seen[2]
    assert {event.position.incarnation for event in seen[0]} == {wire.info().incarnation}
    for watch in watches:
        watch.cancel()


def test_an_event_tells_of_each_push(wire: Wire) -> None:
    wire.create("m", groups=[adadelta(lr=0.5, rho=0.8)], policy=sync(3))
    wire.open("m", "b")
    sessions = {name: wire.open("m", name) for name in ("c", "b", "Z")}
    watch = wire.watch("m")
    watch.next()
    weights = {"c": 1.0, "b": 32.5, "Z": 1e-3}
    for number in (1, 2):
        calls = [
            wire.begin(session.header(number, weight=weights[name]), gradient(ord(name) + number, SIZE))
            for name, session in sessions.items()
        ]
        results = {name: streamed(call).result for name, call in zip(sessions, calls, strict=True)}
        (event,) = watch.until(number)
        epochs = {"Z": 1, "b": 2, "c": 1}
        assert _contributions(event) == [(n, epochs[n], number, 0, weights[n]) for n in ("Z", "b", "c")]
        for contribution in event.update.contributions:
            values = gradient(ord(contribution.worker) + number, SIZE)
            assert contribution.gradient_norm == results[contribution.worker].gradient_norm
            assert contribution.gradient_norm == pytest.approx(norm(values), rel=1e-6)
        assert event.update.update_norm == results["b"].update_norm > 0
        assert list(event.update.hyperparameters) == list(results["b"].hyperparameters)
        assert event.update.hyperparameters[0].adadelta.rho == 0.8
    watch.cancel()


@pytest.mark.parametrize(
    "policy", [asynchronous(), asynchronous(damping=True), bounded(9)], ids=["async", "damping", "bounded"]
)
def test_an_event_tells_how_stale_a_push_was_and_the_rate_that_was_used(wire: Wire, policy: Policy) -> None:
    wire.create("m", policy=policy)
    a, b = wire.open("m", "a"), wire.open("m", "b")
    watch = wire.watch("m")
    watch.next()
    _advance(wire, a, (1, 2, 3))
    wire.step(b.header(1, base_version=0), gradient(1, SIZE))
    last = watch.until(4)[-1]
    assert _contributions(last) == [("b", 1, 1, 3, 1.0)]
    assert last.update.hyperparameters[0].adadelta.lr == (0.25 if getattr(policy, "async").damping else 1.0)
    watch.cancel()


def test_a_duplicate_and_a_refusal_are_no_events(wire: Wire) -> None:
    wire.create("m", policy=asynchronous(max_staleness=0))
    a = wire.open("m", "a")
    watch = wire.watch("m")
    watch.next()
    _advance(wire, a, (1, 1, 2, 1))
    with pytest.raises(grpc.RpcError):
        wire.step(a.header(3, base_version=0), gradient(3, SIZE))
    _advance(wire, a, (3,))
    assert [event.position.version for event in watch.until(3)] == [1, 2, 3]
    watch.cancel()


def test_a_version_without_an_update_has_no_update(wire: Wire) -> None:
    wire.create("m", {"w": (SIZE,)}, policy=sync(2))
    a, b = wire.open("m", "a"), wire.open("m", "b")
    watch = wire.watch("m")
    watch.next()
    _put(wire, "m")
    calls = [wire.begin(session.header(1, base_version=1), gradient(1, SIZE)) for session in (a, b)]
    for call in calls:
        streamed(call)
    call = wire.begin(a.header(2), gradient(1, SIZE))
    late = wire.open("m", "c")
    assert late.opened.first_version == 3
    wire.close(b)  # now the round lacks a worker, and takes in the one that waits for the next
    wire.step(late.header(1, base_version=3), gradient(1, SIZE))
    streamed(call)
    events = watch.until(4)
    assert [(e.position.version, e.HasField("update")) for e in events] == [
        (1, False),
        (2, True),
        (3, False),
        (4, True),
    ]
    assert _contributions(events[3]) == [("a", 1, 2, 1, 1.0), ("c", 1, 1, 0, 1.0)]
    watch.cancel()


# --- who is slow


@pytest.mark.deep
def test_a_slow_watcher_loses_the_oldest_events_and_delays_nobody(wire: Wire) -> None:
    """It reads one message, and then nothing until a thousand updates are made."""
    groups, steps = [adadelta()] * 200, 1000
    wire.create("m", groups=groups)  # so that messages are of 8 KB, and the connection holds few of them
    session = wire.open("m", "a")
    slow, quick = wire.watch("m"), wire.watch("m")
    slow.next()
    quick.next()
    longest = 0.0
    with ThreadPoolExecutor(1) as threads:
        reader = threads.submit(quick.until, steps)
        for number in range(1, steps + 1):
            began = monotonic()
            wire.step(session.header(number), [1.0] * SIZE)
            longest = max(longest, monotonic() - began)
        everything = reader.result()
    assert longest < 5.0, "no step waits for a watcher"
    events = slow.until(steps)
    assert sum(event.missed for event in events) + len(events) == steps
    version, gaps = 0, 0
    for event in events:
        assert event.position.version == version + event.missed + 1
        version, gaps = event.position.version, gaps + bool(event.missed)
    assert gaps >= 1, "the watcher was not slow enough to show anything"
    assert [event.missed for event in events[-255:]] == [0] * 255, "the newest 256 are kept"
    by_version = {event.position.version: event for event in everything}
    for event in events:
        assert event.update == by_version[event.position.version].update
    _advance(wire, session, (steps + 1,))
    (last,) = slow.until(steps + 1)
    assert last.missed == 0
    for watch in (slow, quick):
        watch.cancel()


# --- how it ends


def test_deleting_the_model_ends_it(wire: Wire) -> None:
    wire.create("m")
    watch = wire.watch("m")
    watch.next()
    _advance(wire, wire.open("m", "a"), (1, 2))
    wire.delete("m")
    wire.create("m")
    assert [watch.next().position.version for _ in range(2)] == [1, 2], "what had happened before still comes"
    refused = watch.refused()
    assert (refused.reason, refused.metadata) == ("MODEL_NOT_FOUND", {"model": "m"})


def test_a_server_that_stops_ends_it(own_wire: Wire, own_server: LocalServer) -> None:
    wire, server = own_wire, own_server
    wire.create("m", policy=sync(2))
    a, b = wire.open("m", "a"), wire.open("m", "b")
    watch = wire.watch("m")
    watch.next()
    call = wire.begin(a.header(1), gradient(1, SIZE))
    with ThreadPoolExecutor(1) as threads:
        stopping = threads.submit(server.stop, 20.0)
        eventually(lambda: bool(server._catalog.quotas.draining), "the server does not stop")
        late = wire.watch("m")
        assert late.next().position.version == 0, "a round is still under way: there is something to watch"
        wire.step(b.header(1), gradient(2, SIZE))
        streamed(call)
        for each in (watch, late):
            assert _contributions(each.next()) == [("a", 1, 1, 0, 1.0), ("b", 1, 1, 0, 1.0)]
            refused = each.refused()
            assert refused.reason == "DRAINING"
            assert refused.retry_seconds is not None
        stopping.result()


def test_the_number_of_watchers_is_over_all_models(small: Wire) -> None:
    assert small.info().limits.watchers == WATCHERS
    small.create("m")
    small.create("n")
    watches = [small.watch("mn"[k % 2]) for k in range(WATCHERS)]
    for watch in watches:
        watch.next()
    for name in "mn":
        refused = small.watch(name).refused()
        assert (refused.reason, refused.metadata) == ("WATCHER_LIMIT", {"limit": str(WATCHERS)})
    session = small.open("m", "a")
    assert small.step(session.header(1), gradient(1, SIZE)).result.version == 1


def _place(wire: Wire, seconds: float = 20.0) -> Watch:
    """Starts to watch as soon as a place is free."""
    held: list[Watch] = []

    def taken() -> bool:
        watch = wire.watch("m", seconds)
        try:
            watch.next()
        except grpc.RpcError:
            return False
        held.append(watch)
        return True

    eventually(taken, "there is no place")
    return held[0]


def _come_and_leave(small: Wire, way: str) -> None:
    """Takes all places of watchers, and frees them."""
    with Wire(small.target) as other:  # its connection ends with it
        watches = [_place(other, 0.5 if way == "deadline" else 20.0) for _ in range(WATCHERS)]
        if way == "unread":
            _advance(small, small.open("m", "a"), range(1, 50))
        if way == "model":
            small.delete("m")
            small.create("m")
        for watch in watches:
            if way == "deadline":
                with pytest.raises(grpc.RpcError):
                    watch.next()
            elif way in ("cancel", "unread"):
                watch.cancel()


@pytest.mark.parametrize("way", ["cancel", "deadline", "disconnect", "model", "unread"])
def test_a_watcher_that_leaves_frees_its_place(small: Wire, way: str) -> None:
    small.create("m")
    for _ in range(1 if way == "deadline" else 4):  # a deadline is time that passes
        _come_and_leave(small, way)
    assert [_place(small).next for _ in range(WATCHERS)]


def test_a_refused_watcher_takes_no_place(small: Wire) -> None:
    small.create("m")
    for _ in range(2 * WATCHERS):
        assert small.watch("nothing").refused().reason == "MODEL_NOT_FOUND"
    watches = [small.watch("m") for _ in range(WATCHERS)]
    for watch in watches:
        assert watch.next().position.version == 0


def test_watchers_see_versions_without_a_gap_whenever_they_join(wire: Wire) -> None:
    wire.create("m", policy=sync(2))
    sessions = [wire.open("m", name) for name in "ab"]
    steps = 150

    def train(session: Session) -> None:
        for number in range(1, steps + 1):
            wire.step(session.header(number), np.ones(SIZE))

    def look(seed: int) -> int:
        seen = 0
        while seen < steps:
            watch = wire.watch("m")
            version = watch.next().position.version
            for event in watch.until(min(version + seed, steps)) if version < steps else ():
                assert event.position.version == version + 1
                assert len(event.update.contributions) == 2
                version = event.position.version
            seen = version
            watch.cancel()
        return seen

    with ThreadPoolExecutor() as threads:
        workers = [threads.submit(train, session) for session in sessions]
        assert list(threads.map(look, (1, 3, 7))) == [steps] * 3
        for done in workers:
            done.result()
