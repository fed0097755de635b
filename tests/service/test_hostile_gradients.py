"""G12: no worker can make the state non-finite, or freeze a coordinate of it, under any policy.

Ten thousand adversarial gradients a policy, one in each coordinate of vectors: what is accepted leaves the state finite
and every coordinate able to move, what is refused changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
import numpy as np
import pytest
from expected import STRUCTURES
from messages import Vector, adadelta, asynchronous, bounded, cut, floats, sync
from wire import Session, Snapshot, Wire, refusal, streamed

from deltaserve._common.optimizer_messages import to_message
from deltaserve._common.optimizers import Adadelta, Optimizer
from deltaserve._common.optimizers.definition import MAGNITUDE_MAX
from deltaserve.v1.common_pb2 import REDUCTION_MEDIAN, REDUCTION_TRIMMED_MEAN, Policy
from deltaserve.v1.worker_service_pb2 import StepRequest

GRADIENTS = 10_000
SIZE = 128
"""Elements of the model. Each counts as one gradient."""

POLICIES: dict[str, Policy] = {
    "sync mean": sync(3),
    "sync mean, clipped": sync(3, clip_norm=1.0),
    "sync mean, clipped to almost nothing": sync(3, clip_norm=1e-30),
    "sync mean, clipped to almost everything": sync(3, clip_norm=1e308),
    "sync median": sync(3, reduction=REDUCTION_MEDIAN),
    "sync trimmed mean": sync(3, reduction=REDUCTION_TRIMMED_MEAN, trim=1, clip_norm=1e25),
    "async": asynchronous(),
    "async, damping": asynchronous(damping=True),
    "bounded": bounded(2),
}
FAST = ("sync mean, clipped to almost nothing", "sync trimmed mean", "async")
"""The policies of the fast tier."""

KINDS = ("mixed", "largest", "denormal", "huge", "zeros", "alternating")
BAD = (np.nan, -np.nan, np.inf, -np.inf, 1.9e19, 1e20, -1e30, 3.4e38, -3.4028235e38)


def _values(random: np.random.Generator, kind: str) -> Vector:
    """Returns an adversarial gradient that is accepted."""
    signs = random.choice(np.array([-1.0, 1.0]), SIZE)
    match kind:
        case "largest":
            magnitudes = np.full(SIZE, MAGNITUDE_MAX)
        case "denormal":
            magnitudes = random.integers(0, 1 << 23, SIZE) * 2.0**-149
        case "huge":
            magnitudes = 10.0 ** random.uniform(18, np.log10(MAGNITUDE_MAX), SIZE)
        case "zeros":
            magnitudes = np.zeros(SIZE)
        case "alternating":
            magnitudes = np.where(np.arange(SIZE) % 2, MAGNITUDE_MAX, 2.0**-149)
        case _:
            magnitudes = 10.0 ** random.uniform(-45, np.log10(MAGNITUDE_MAX), SIZE)
    return np.asarray(signs * magnitudes, np.float32)


@dataclass
class Attack:
    """A model under attack.

    Attributes:
        own: The model's optimizer.
        sent: How many gradients were sent, bad ones included.
        refused: How many of its pushes were refused.
    """

    wire: Wire
    policy: Policy
    own: Optimizer = field(default_factory=Adadelta)
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(12))
    sent: int = 0
    refused: int = 0

    def __post_init__(self) -> None:
        weights = self.random.standard_normal(SIZE).astype(np.float32)
        groups = [to_message(self.own)]
        self.wire.create("m", {"w": (100,), "b": (28,)}, weights=weights, groups=groups, policy=self.policy)
        self._sessions = [self.wire.open("m", name) for name in "abc"]
        self._number = 0

    def run(self) -> None:
        """Sends the gradients, and checks the state after each step."""
        kinds = [[kind] * 3 for kind in KINDS] + [[KINDS[k % 6], KINDS[(k + 1) % 6], "mixed"] for k in range(6)]
        steps = 0
        while self.sent < GRADIENTS:
            self.step(kinds[steps % len(kinds)])
            self.state()
            steps += 1
        assert self.refused == 3 * steps
        assert steps >= len(kinds)

    def step(self, kinds: Sequence[str]) -> None:
        """Makes one step of each worker, after one refused push of each."""
        for session in self._sessions:
            self._refused(session)
        self.push([_values(self.random, kind) for kind in kinds])
        self.sent += 2 * SIZE * len(kinds)

    def push(self, gradients: Sequence[Vector]) -> None:
        """Makes one step of each worker."""
        self._number += 1
        weights = 10.0 ** self.random.uniform(-9, 9, 3)
        calls = [
            self.wire.begin(session.header(self._number, base_version=self._base(), weight=weight), values)
            for session, values, weight in zip(self._sessions, gradients, weights, strict=True)
        ]
        assert not any(streamed(call).result.duplicate for call in calls)

    def state(self) -> Snapshot:
        """Returns the model's state, and checks that it is finite."""
        state = self.wire.snapshot("m")
        assert np.isfinite(state.weights).all()
        for slot, vector in zip(self.own.slots, state.arrays[1:], strict=True):
            assert np.isfinite(vector).all()
            assert (vector >= slot.minimum).all()
        return state

    def _base(self) -> int:
        version = self.wire.model("m").position.version
        return version if self.policy.HasField("sync") else int(self.random.integers(max(version - 9, 0), version + 1))

    def _refused(self, session: Session) -> None:
        values = _values(self.random, "mixed")
        places = self.random.integers(0, SIZE, self.random.integers(1, 4))
        values[places] = self.random.choice(np.array(BAD, np.float32), places.size)
        first = values[places.min()]
        header = session.header(self._number + 1)
        refused = self.wire.refused("Step", StepRequest(header=header, gradient=floats(values)))
        assert refused.reason == ("VALUE_TOO_LARGE" if np.isfinite(first) else "VALUE_NOT_FINITE")
        self.refused += 1


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.deep) for name in POLICIES]
)
def test_ten_thousand_adversarial_gradients_leave_the_state_finite_and_every_coordinate_able_to_move(
    wire: Wire, name: str
) -> None:
    attack = Attack(wire, POLICIES[name])
    attack.run()
    _moves(attack)


@pytest.mark.deep
@pytest.mark.parametrize("own", STRUCTURES.values(), ids=STRUCTURES)
def test_ten_thousand_adversarial_gradients_leave_the_state_of_every_optimizer_finite(
    wire: Wire, own: Optimizer
) -> None:
    Attack(wire, asynchronous(), own).run()


def _moves(attack: Attack) -> None:
    """Checks that gradients of 1 move every coordinate, once the averages of the attack have decayed.

    After the largest gradient that takes 650 steps with rho = 0.9, and 20 here. After an infinity it never would.
    """
    policy = Policy()
    policy.CopyFrom(attack.policy)
    if 0 < policy.sync.clip_norm < 0.1:  # which would leave nothing of the gradient
        policy.sync.ClearField("clip_norm")
    attack.wire.update("m", [adadelta(rho=0.01)], policy)
    for _ in range(20):
        attack.push([np.ones(SIZE, np.float32)] * 3)
    before = attack.state().weights
    attack.push([np.ones(SIZE, np.float32)] * 3)
    assert (attack.state().weights < before).all()


def test_refused_pushes_change_no_bit_of_what_follows(
    wire: Wire,
) -> None:
    for name, bad in (("calm", ()), ("attacked", BAD)):
        wire.create(name, {"w": (SIZE,)})
        session = wire.open(name, "a")
        for number in range(1, 6):
            for value in bad:
                values = np.ones(SIZE, np.float32)
                values[number] = value
                with pytest.raises(grpc.RpcError) as caught:
                    wire.stream_step(session.header(number), cut(values, 64))
                assert refusal(caught.value).reason.startswith("VALUE_")
            wire.step(session.header(number), np.full(SIZE, number))
    calm, attacked = wire.snapshot("calm"), wire.snapshot("attacked")
    assert (calm.version, calm.vectors, calm.sessions) == (attacked.version, attacked.vectors, attacked.sessions)
