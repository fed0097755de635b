"""Every value that the protocol allows survives, through the journal and through a snapshot."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_host import copied

sys.path.append(str(Path(__file__).parents[1] / "service"))

from messages import Shapes, asynchronous, bounded, pieces, sync
from wire import Session, Snapshot, Wire

from deltaserve._common import optimizers
from deltaserve._common.optimizer_messages import to_message
from deltaserve._common.optimizers.definition import FLOAT32_MAX, MAGNITUDE_MAX, Bounds
from deltaserve.v1.common_pb2 import Policy, TensorSpec
from deltaserve.v1.model_service_pb2 import ExtendModelHeader, ExtendModelRequest, SaveSnapshotRequest
from deltaserve.v1.optimizers_pb2 import Adadelta, Optimizer
from deltaserve_server import LocalServer, ServerConfig
from deltaserve_server.durability.model_storage import ModelStorage

SIZE = 4
GRADIENT = (MAGNITUDE_MAX, -MAGNITUDE_MAX, 1.0, 0.0)
TINY, HUGE = 5e-324, sys.float_info.max
"""The smallest and the largest double."""

LARGEST = float(np.nextafter((2.0 - 2.0**-24) * 2.0**127, 0.0))
"""The largest double that is finite in float32."""

SMALLEST = float(np.nextafter(2.0**-150, 1.0))
"""The smallest double that is not 0 in float32."""

POLICIES = {
    "staleness": asynchronous(max_staleness=2**64 - 1, damping=True),
    "no-staleness": asynchronous(max_staleness=0),
    "slack": bounded(2**32 - 1),
    "workers": sync(65_536, quorum=65_536, reduction="REDUCTION_TRIMMED_MEAN", trim=32_767),
    "waits": sync(1, quorum=1, grace_seconds=86_400.0, round_timeout_seconds=86_400.0, clip_norm=HUGE),
    "no-waits": sync(1, quorum=1, grace_seconds=TINY, round_timeout_seconds=TINY, clip_norm=TINY),
}

ADADELTAS = {
    "largest": Adadelta(lr=2.0**38, rho=1.0, eps=2.0**64, weight_decay=LARGEST, maximize=True),
    "smallest": Adadelta(lr=0.0, rho=0.0, eps=2.0**-126, weight_decay=0.0),
    "tiny": Adadelta(lr=TINY, rho=TINY, eps=2.0**-126, weight_decay=TINY),
    "fast": Adadelta(lr=2.0**38, rho=0.0, eps=2.0**-126),
}
GROUPS = {name: Optimizer(adadelta=group) for name, group in ADADELTAS.items()}


def at_limit(kind: str, *, largest: bool) -> Optimizer:
    """Returns an optimizer with every hyperparameter at its largest or its smallest value, except for options."""
    made, limits = optimizers.OPTIMIZERS[kind](), dict[str, float]()
    for field in dataclasses.fields(made):
        bounds: Bounds | None = field.metadata.get("bounds")
        if bounds is None:
            continue
        high = LARGEST if bounds.maximum is None else bounds.maximum
        high = high if bounds.below is None else float(np.nextafter(bounds.below, 0.0))
        low = SMALLEST if bounds.minimum is None else bounds.minimum
        limits[field.name] = high if largest else low
    return to_message(dataclasses.replace(made, **limits))


OTHERS = [kind for kind in optimizers.OPTIMIZERS if kind != "adadelta"]

SHAPES: Shapes = {
    "scalar": (),
    "none": (0,),
    "none of many": (0, 2**48),
    "eight": (1, 2, 1, 3, 1, 1, 2, 1),
    "none of eight": (0,) * 8,
}

NAMES = ("m" * 128, "0", "A.new", "a.corrupt", "b.-_", "head.json")
TENSOR_NAMES = ("w" * 256, "é" * 256, "😀" * 256, '"\\/', "__metadata__", " ")


class Lives:
    """A server that is killed and started again.

    Args:
        path: Place for its data directory.
        through: What its models recover from: "journal" or "snapshot".
    """

    def __init__(self, path: Path, through: str) -> None:
        self._path = path
        self._through = through

    @contextmanager
    def first(self, **more: Any) -> Iterator[Wire]:
        """Runs the first server; it is killed when the block ends."""
        with _serving(self._path / "data", **more) as wire:
            yield wire
            names = [model.name for model in wire.models()]
            for name in names if self._through == "snapshot" else ():
                wire.one("SaveSnapshot", SaveSnapshotRequest(model=name))
            copied(self._path / "data", self._path / "copy")
            self._left = _seen(wire)
        for name in names:
            snapshots = list((self._path / "copy" / "models" / name).glob("snapshot-*.json"))
            assert len(snapshots) == (2 if self._through == "snapshot" else 1)

    @contextmanager
    def second(self, **more: Any) -> Iterator[Wire]:
        """Runs the second server, after checking that it recovered everything."""
        with _serving(self._path / "copy", **more) as wire:
            assert _seen(wire) == self._left
            yield wire


@contextmanager
def _serving(data: Path, **more: Any) -> Iterator[Wire]:
    config = ServerConfig(device="cpu", data_dir=data, durability="journal", snapshot_seconds=None, **more)
    with LocalServer(config) as server, Wire(server.target) as wire:
        yield wire


def _seen(wire: Wire) -> list[tuple[str, Snapshot]]:
    return [(model.name, wire.snapshot(model.name)) for model in wire.models()]


@pytest.fixture(params=["journal", "snapshot"])
def lives(request: pytest.FixtureRequest, quick: Path, monkeypatch: pytest.MonkeyPatch) -> Lives:
    # Some changes request a snapshot; here only the test takes snapshots.
    monkeypatch.setattr(ModelStorage, "due", lambda *_: False)
    return Lives(quick, request.param)


def put_state(wire: Wire, counts: Sequence[int], weights: float, squares: float) -> None:
    """Calls PutState with constant vectors."""
    vectors = [np.full(SIZE, value, np.float32) for value in (weights, squares, squares)]
    wire.put("m", vectors, counts)


def extend(wire: Wire, shapes: Shapes, groups: Sequence[Optimizer] = ()) -> None:
    """Calls ExtendModel; all new tensors belong to the last group."""
    tensors = [TensorSpec(name=name, shape=shape, group=len(groups)) for name, shape in shapes.items()]
    header = ExtendModelHeader(model="m", tensor_count=1, group_count=1, tensors=tensors, groups=groups)
    weights = np.ones(sum(int(np.prod(shape)) for shape in shapes.values()))
    chunks = [ExtendModelRequest(weights=piece) for piece in pieces(weights, SIZE)]
    wire.one("ExtendModel", ExtendModelRequest(header=header), *chunks)


def begin(wire: Wire, name: str = "m", **more: Any) -> Session:
    """Creates a model and opens a session."""
    wire.create(name, {"w": (SIZE,)}, weights=[2.0, -3.0, 0.0, 1.0], **more)
    return wire.open(name, "a")


@pytest.mark.parametrize("how", ["created", "changed"])
def test_policies_at_their_limits_survive(lives: Lives, how: str) -> None:
    with lives.first(sessions=65_536) as wire:
        for name, policy in POLICIES.items():
            begin(wire, name, policy=policy if how == "created" else None)
            if how == "changed":
                wire.update(name, policy=policy)
    with lives.second(sessions=65_536):
        pass


@pytest.mark.parametrize("how", ["created", "changed"])
def test_hyperparameters_and_gradients_at_their_limits_survive(lives: Lives, how: str) -> None:
    with lives.first() as wire:
        for name, group in GROUPS.items():
            session = begin(wire, name, groups=[group] if how == "created" else ())
            if how == "changed":
                wire.update(name, groups=[group])
            for number in (1, 2, 3):
                wire.step(session.header(number), np.multiply(GRADIENT, (-1) ** number))
    with lives.second():
        pass


@pytest.mark.parametrize("kind", OTHERS)
def test_other_optimizers_at_their_limits_survive(lives: Lives, kind: str) -> None:
    with lives.first() as wire:
        for name, largest in (("largest", True), ("smallest", False)):
            session = begin(wire, name, groups=[at_limit(kind, largest=largest)])
            for number in (1, 2, 3):
                wire.step(session.header(number), np.multiply(GRADIENT, (-1) ** number))
    with lives.second():
        pass


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_a_push_with_hyperparameters_at_their_limits_survives_with_its_answer(lives: Lives, group: Optimizer) -> None:
    with lives.first() as wire:
        session = begin(wire)
        for number in (1, 2, 2):
            result = wire.step(session.header(number, hyperparameters=[group]), GRADIENT).result
        assert result.duplicate
    with lives.second() as wire:
        again = wire.step(session.header(2, hyperparameters=[group]), GRADIENT).result
    result.update_norm = min(result.update_norm, HUGE)  # JSON has no infinity
    assert again == result


@pytest.mark.parametrize("count", [2**62, 2**63 - 1])
def test_states_at_their_limits_survive(lives: Lives, count: int) -> None:
    with lives.first() as wire:
        session = begin(wire)
        put_state(wire, [count], MAGNITUDE_MAX, FLOAT32_MAX)
        put_state(wire, [count], -MAGNITUDE_MAX, 0.0)
        for number in (1, 2):
            wire.step(session.header(number), GRADIENT)
        assert wire.snapshot("m").update_counts == (count + 2,)
    with lives.second() as wire:
        assert wire.step(session.header(3), GRADIENT).result.version == 5


@pytest.mark.parametrize("policy", [asynchronous(damping=True), sync(2)], ids=["async", "sync"])
def test_weights_of_pushes_at_their_limits_survive(lives: Lives, policy: Policy) -> None:
    with lives.first() as wire:
        light, heavy = begin(wire, policy=policy), wire.open("m", "b")
        for number in (1, 2):
            call = wire.begin(light.header(number, weight=1e-9), GRADIENT)
            wire.step(heavy.header(number, weight=1e9), np.negative(GRADIENT))
            assert list(call)
    with lives.second() as wire:
        assert wire.step(heavy.header(2, weight=1e9), np.negative(GRADIENT)).result.duplicate


@pytest.mark.parametrize("limits", [(1.0, 3600.0), (TINY, 1e9)], ids=["default", "widest"])
def test_leases_at_their_limits_survive(lives: Lives, limits: tuple[float, float]) -> None:
    given: dict[str, Any] = {"lease_seconds_min": limits[0], "lease_seconds_max": limits[1]}
    with lives.first(**given) as wire:
        begin(wire)
        wire.open("m", "short", limits[0])
        long = wire.open("m", "long", limits[1])
        # The short lease must not expire before the check.
        wire.open("m", "short", limits[1])
    with lives.second(**given) as wire:
        assert wire.keep(long).lease_seconds == limits[1]


def test_names_at_their_limits_survive(lives: Lives) -> None:
    with lives.first() as wire:
        for name in NAMES:
            wire.create(name, dict.fromkeys(TENSOR_NAMES, (2,)))
            wire.open(name, name)
    with lives.second() as wire:
        assert {model.name for model in wire.models()} == set(NAMES)


@pytest.mark.parametrize("how", ["created", "extended"])
def test_layouts_at_their_limits_survive(lives: Lives, how: str) -> None:
    with lives.first() as wire:
        if how == "created":
            wire.create("m", SHAPES)
        else:
            wire.create("m", {"w": (SIZE,)})
            extend(wire, {**SHAPES, **dict.fromkeys(TENSOR_NAMES, ())})
        session = wire.open("m", "a")
        for number in (1, 2):
            wire.step(session.header(number), wire.snapshot("m").weights + 1)
    with lives.second() as wire:
        wire.step(session.header(3), wire.snapshot("m").weights)


@pytest.mark.deep
def test_the_largest_number_of_groups_survives(lives: Lives) -> None:
    with lives.first() as wire:
        wire.create("m", {"w": (SIZE,)})
        third = 1 / 3  # of many digits
        groups = [Optimizer(adadelta=Adadelta(lr=n + third, rho=third, eps=third)) for n in range(4095)]
        extend(wire, {"v": (1,)}, groups)
        session = wire.open("m", "a")
        wire.step(session.header(1), np.ones(SIZE + 1))
    with lives.second() as wire:
        assert len(wire.model("m").config.groups) == 4096
        wire.step(session.header(2), np.ones(SIZE + 1))
