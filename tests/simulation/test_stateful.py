"""The same comparison driven by hypothesis, which shrinks a violating history to the shortest it can find."""

from typing import Any

import pytest
from histories import ABSENT, ASYNC, BOUNDED, CARRIED, NAMES, NORMS, SYNC, WEIGHTS, Event, Scenario
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from simulator import Simulation

from deltaserve._common.optimizers import OPTIMIZERS, Optimizer
from deltaserve_server.model import Policy

POLICIES = (*SYNC, *ASYNC, *BOUNDED)
WORKERS = st.integers(0, 3)
SESSIONS = st.sampled_from([0, 0, 0, 1])
STRANGERS = st.sampled_from([0, 0, 0, 0, 1, 2])
PUSHES = {
    "worker": WORKERS,
    "session": SESSIONS,
    "number": st.sampled_from([0, 0, 0, 0, -1, 1, -2, -8]),
    "age": st.sampled_from([0, 0, 0, 1, 2, 5, -1, None]),
    "weight": st.sampled_from(WEIGHTS),
    "norm": st.sampled_from(NORMS),
    "carried": st.sampled_from(CARRIED),
    "surplus": st.sampled_from([0, 0, 0, 1]),
    "absent": st.sampled_from(ABSENT),
    "twisted": st.booleans(),
    "stranger": STRANGERS,
    "patient": st.booleans(),
}


class Comparison(RuleBasedStateMachine):
    """For any sequence of events, the machine decides what the reference decides."""

    simulation: Simulation

    @initialize(first=st.sampled_from(POLICIES), kind=st.sampled_from(list(OPTIMIZERS.values())))
    def begin(self, first: Policy, kind: type[Optimizer]) -> None:
        self.simulation = Simulation(Scenario((first, *POLICIES), optimizer=kind()))

    def _take(self, event: Event) -> None:
        self.simulation.step(event, snapshot=True)

    @rule(worker=WORKERS)
    def step(self, worker: int) -> None:
        self._take(Event("push", worker=worker, patient=True))

    @rule(given=st.fixed_dictionaries(PUSHES))
    def push(self, given: dict[str, Any]) -> None:
        self._take(Event("push", **given))

    @rule(given=st.fixed_dictionaries(PUSHES))
    def check(self, given: dict[str, Any]) -> None:
        self._take(Event("check", **given))

    @rule(worker=WORKERS, number=st.integers(0, 23))
    def open(self, worker: int, number: int) -> None:
        self._take(Event("open", worker=worker, number=number))

    @rule(worker=WORKERS, session=SESSIONS, stranger=STRANGERS)
    def close(self, worker: int, session: int, stranger: int) -> None:
        self._take(Event("close", worker=worker, session=session, stranger=stranger))

    @rule(worker=WORKERS, session=SESSIONS, stranger=STRANGERS)
    def keep(self, worker: int, session: int, stranger: int) -> None:
        self._take(Event("keep", worker=worker, session=session, stranger=stranger))

    @rule(worker=WORKERS)
    def lose_the_answer(self, worker: int) -> None:
        self._take(Event("lose the answer", worker=worker))

    @rule(wait=st.sampled_from([0.0, 0.25, 0.5, 1.0, 4.0, 12.0]))
    def tick(self, wait: float) -> None:
        self._take(Event("tick", wait=wait))

    @rule(number=st.integers(0, 3 * len(POLICIES)))
    def change(self, number: int) -> None:
        self._take(Event("change", number=number))

    @rule(extends=st.booleans(), number=st.integers(0, 3))
    def state(self, extends: bool, number: int) -> None:
        self._take(Event("extend" if extends else "put state", number=number))

    @rule(worker=WORKERS, session=SESSIONS, number=st.sampled_from([1, 0, -1, -8, -9]), stranger=STRANGERS)
    def ask(self, worker: int, session: int, number: int, stranger: int) -> None:
        self._take(Event("ask", worker=worker, session=session, number=number, stranger=stranger))

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.flush()


class LongComparison(Comparison):
    """The same with many more histories."""


COMMON = settings(
    stateful_step_count=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
Comparison.TestCase.settings = settings(COMMON, max_examples=30)
LongComparison.TestCase.settings = settings(COMMON, max_examples=500)
TestComparison = Comparison.TestCase
TestLongComparison = pytest.mark.deep(LongComparison.TestCase)

assert len(NAMES) > 3
