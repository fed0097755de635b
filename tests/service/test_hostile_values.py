"""Invalid gradient values are refused at any position; valid ones leave the state finite."""

import numpy as np
import pytest
from messages import adadelta, cut, floats, push, sync
from wire import Wire, streamed, unchanged

from deltaserve._common.optimizers.definition import MAGNITUDE_MAX
from deltaserve.v1.worker_service_pb2 import StepRequest

SIZE, CHUNK = 1000, 64
SHAPES = {"a": (300,), "none": (0,), "b": (7, 100)}
BEYOND = float(np.nextafter(np.float32(MAGNITUDE_MAX), np.float32(np.inf)))

BAD = {
    "nan": (np.nan, "VALUE_NOT_FINITE"),
    "negative nan": (-np.nan, "VALUE_NOT_FINITE"),
    "inf": (np.inf, "VALUE_NOT_FINITE"),
    "-inf": (-np.inf, "VALUE_NOT_FINITE"),
    "1e20": (1e20, "VALUE_TOO_LARGE"),
    "-3e38": (-3e38, "VALUE_TOO_LARGE"),
    "just beyond": (BEYOND, "VALUE_TOO_LARGE"),
}
PLACES = (0, 1, CHUNK - 1, CHUNK, 299, 300, 959, 960, SIZE - 2, SIZE - 1)
"""First and last elements of vector, chunks and tensors."""


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_value_is_found_at_any_position(wire: Wire, kind: str) -> None:
    value, reason = BAD[kind]
    wire.create("m", SHAPES)
    session = wire.open("m", "w")
    wire.step(session.header(1), np.ones(SIZE))
    for place in PLACES:
        gradient = np.ones(SIZE, np.float32)
        gradient[place] = value
        expected = {"tensor": "a" if place < 300 else "b", "index": str(place if place < 300 else place - 300)}
        with unchanged(wire, "m"):
            for refused in (
                wire.refused("Step", StepRequest(header=session.header(2), gradient=floats(gradient))),
                wire.refused("StreamStep", *push(session.header(2), cut(gradient, CHUNK))),
            ):
                assert (refused.reason, refused.metadata) == (reason, expected)
    wire.step(session.header(2), np.ones(SIZE))


def test_every_pattern_of_a_nan_is_one(wire: Wire) -> None:
    wire.create("m", {"w": (1,)})
    session = wire.open("m", "w")
    for bits in (0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFC00000, 0xFFFFFFFF):
        request = StepRequest(header=session.header(1), gradient=bits.to_bytes(4, "little"))
        assert wire.refused("Step", request).reason == "VALUE_NOT_FINITE"


@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1.0, 1e18, MAGNITUDE_MAX])
def test_accepted_values_leave_the_state_finite(wire: Wire, scale: float) -> None:
    """Also with hyperparameters at their limits, and right after gradients of other magnitudes."""
    wire.create("m", {"w": (SIZE,)})
    session, number = wire.open("m", "w"), 0
    random = np.random.default_rng(1)
    for own in (
        None,
        adadelta(rho=0.0),
        adadelta(rho=1.0),
        adadelta(eps=2.0**-126),
        adadelta(eps=2.0**64),
        adadelta(weight_decay=3e38),
        adadelta(lr=0.0, weight_decay=1.0, maximize=True),
    ):
        for factor in (1.0, -1.0, 0.0, 1e-30):
            number += 1
            signs = random.choice([-1.0, 1.0], SIZE)
            header = session.header(number, hyperparameters=[own] if own else [])
            wire.step(header, np.float32(scale) * np.float32(factor) * signs.astype(np.float32))
    state = wire.snapshot("m")
    assert state.version == number
    for vector in state.arrays:
        assert np.isfinite(vector).all()
    assert (state.square_avg >= 0).all()
    assert (state.acc_delta >= 0).all()


def test_the_mean_of_a_round_of_the_largest_values_is_finite(wire: Wire) -> None:
    wire.create("m", {"w": (SIZE,)}, policy=sync())
    sessions = [wire.open("m", f"w{k:02}") for k in range(20)]
    calls = [wire.begin(session.header(1), np.full(SIZE, MAGNITUDE_MAX)) for session in sessions]
    assert all(np.isfinite(streamed(call).weights).all() for call in calls)
    assert np.isfinite(wire.snapshot("m").square_avg).all()


def test_no_learning_rate_makes_weights_infinite(wire: Wire) -> None:
    wire.create("m", {"w": (4,)})
    session = wire.open("m", "w")
    own = adadelta(lr=2.0**38, eps=2.0**64)
    answer = wire.step(session.header(1, hyperparameters=[own]), np.full(4, 1e10))
    assert np.isfinite(answer.weights).all()


def test_denormal_values_are_values(wire: Wire) -> None:
    wire.create("m", {"w": (4,)}, weights=np.zeros(4))
    session = wire.open("m", "w")
    smallest = np.array([1e-45, -1e-45, 1e-39, 0.0], np.float32)
    own = adadelta(rho=0.0, eps=1e-12, lr=1.0)
    answer = wire.step(session.header(1, hyperparameters=[own]), smallest)
    assert np.array_equal(np.sign(answer.weights), [-1, 1, -1, 0])
