"""One run: a server, its workers and what lies between them; faults for a while, quiet, a look at what is left."""

import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep

import faults
from calls import Calls
from deck import Deck
from line import Line
from scenarios import GROUPS, LEASE_SECONDS, MODEL, Scenario
from supervisor import Supervisor
from verdict import Journals, Verdict, judge
from witness import Census, Watch, ask

import deltaserve

WORKERS = ("ada", "bob", "cyd", "dan")

_HERE = Path(__file__).parent
_LOOK_SECONDS = 0.01
_ENDING_SECONDS = 15.0


@dataclass(kw_only=True)
class Plan:
    """What to run.

    Attributes:
        scenario: On which model, under which policy.
        seed: Decides what happens.
        seconds: For how long faults happen.
        rate: How much more often they do than usual.
        plant: A defect of the server; see server_program.
        folder: Where logs and journals go.
    """

    scenario: Scenario
    seed: int
    seconds: float
    rate: float = 1.0
    plant: str = "none"
    folder: Path


@dataclass
class Report:
    """What became of a run: how often which fault fired, what the workers met, and the verdict."""

    fired: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    verdict: Verdict = field(default_factory=Verdict)


@dataclass
class _Life:
    """One process of a worker; `resume` is when it is to go on, where it was stopped."""

    worker: str
    pid: int
    since: float
    resume: float | None = None


class Scene:
    """A run while it goes on."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._scenario = plan.scenario
        self._chance = random.Random(plan.seed)
        self._signals = Deck(self._chance, faults.SIGNALS)
        self._worker_faults = faults.worker_deck(self._chance, plan.scenario.door)
        self._fired: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._lives: dict[int, _Life] = {}
        self._begun = 0
        self._again: list[tuple[float, str]] = []
        self._server_resume: float | None = None
        self._problems: list[str] = []

    def run(self) -> Report:
        plan = self._plan
        with ExitStack() as stack:
            self._server, target = self._start_server(stack)
            client = stack.enter_context(deltaserve.connect(target, timeout_seconds=30))
            self._create(client)
            watch, self._census = Watch(target), Census(target, self._scenario)
            self._open_proxies(stack, target)
            self._supervisor = Supervisor(plan.folder / "workers.err")
            stack.callback(self._supervisor.close)
            for worker in WORKERS:
                self._start(worker)
            self._make_faults()
            self._calm()
            self._census.close()
            watch.wait(lambda: client.model(MODEL).info().version)
            return self._report(client, watch)

    # --- what is there

    def _start_server(self, stack: ExitStack) -> tuple["subprocess.Popen[str]", str]:
        plan = self._plan
        environment = faults.server_environment(plan.seed, plan.rate, plan.folder / "server.faults")
        process = subprocess.Popen(
            [sys.executable, str(_HERE / "server_program.py"), plan.plant],
            stdout=subprocess.PIPE,
            stderr=(plan.folder / "server.err").open("wb"),
            text=True,
            env=os.environ | environment,
        )
        stack.callback(process.communicate)
        stack.callback(process.kill)
        assert process.stdout
        target = process.stdout.readline().strip()
        if not target:
            raise RuntimeError(f"the server did not start: see {plan.folder}/server.err")
        return process, target

    def _create(self, client: deltaserve.Client) -> None:
        scenario = self._scenario
        client.create_model(
            MODEL,
            scenario.cut(scenario.initial),
            groups=GROUPS,
            group_of={spec.name: spec.group for spec in scenario.tensors},
            policy=scenario.policy,
        )

    def _open_proxies(self, stack: ExitStack, target: str) -> None:
        plan = self._plan
        self._line = Line(target, plan.seed, 10 / plan.rate * self._scenario.size * 4, self._note)
        stack.callback(self._line.close)
        self._calls = Calls(target, plan.seed, 12 / plan.rate, self._note)
        stack.callback(self._calls.close)

    def _note(self, fault: str) -> None:
        with self._lock:
            self._fired[fault] += 1

    def _start(self, worker: str) -> None:
        plan = self._plan
        target = self._chance.choice((self._line.target, self._calls.target))
        log = plan.folder / "workers.faults"
        pause = self._chance.choice((0.0, 0.005, 0.02, 0.05))
        self._begun += 1
        journal, scenario = str(self._journal(worker)), self._scenario
        pid = self._supervisor.start(
            [worker, str(self._begun), target, journal, scenario.policy_name, scenario.door, str(pause)],
            faults.worker_environment(self._chance, self._worker_faults, plan.rate, log),
        )
        self._lives[pid] = _Life(worker, pid, monotonic())

    def _journal(self, worker: str) -> Path:
        return self._plan.folder / f"{worker}.journal"

    # --- what happens

    def _make_faults(self) -> None:
        end = monotonic() + self._plan.seconds
        next_signal = monotonic() + 0.3
        while monotonic() < end:
            self._tend()
            now = monotonic()
            for at, worker in list(self._again):
                if now >= at:
                    self._again.remove((at, worker))
                    self._start(worker)
            if now >= next_signal and self._lives:
                self._signal()
                next_signal = now + self._chance.expovariate(1.0 * self._plan.rate)
            sleep(_LOOK_SECONDS)

    def _signal(self) -> None:
        """Does something to a worker, or to the server, at a random time."""
        kind = self._signals.draw()
        if kind == "stop server":
            if self._server_resume is None:
                self._note(f"signal {kind}")
                self._server.send_signal(signal.SIGSTOP)
                self._server_resume = monotonic() + self._chance.uniform(0.02, 0.4)
            return
        running = [life for life in self._lives.values() if life.resume is None]
        if not running:
            return
        life = self._chance.choice(running)
        self._note(f"signal {kind}")
        if kind == "kill worker":
            self._supervisor.signal(life.pid, signal.SIGKILL)
            life.resume = monotonic() + 60
        else:
            short, long = self._chance.uniform(0.02, 0.5), self._chance.uniform(1.3, 2.0) * LEASE_SECONDS
            self._supervisor.signal(life.pid, signal.SIGSTOP)
            life.resume = monotonic() + (short if kind.endswith("shortly") else long)

    def _tend(self) -> None:
        """Takes note of workers that ended or stopped, and lets go on what was stopped for long enough."""
        with suppress(Exception):
            while True:
                event = self._supervisor.events.get_nowait()
                life = self._lives.get(event.pid)
                if life and event.what == "ended":
                    del self._lives[event.pid]
                    self._census.silent(life.worker, event.at)
                    self._again.append((event.at + self._chance.uniform(0.0, 0.4), life.worker))
                    if event.status not in (0, -signal.SIGKILL, -signal.SIGTERM):  # the latter: told as it started
                        self._problems.append(f"worker {life.worker} ended with status {event.status}")
                elif life and life.resume is None:  # it stopped itself
                    life.resume = event.at + self._chance.uniform(0.02, 2.0)
        now = monotonic()
        for life in self._lives.values():
            if life.resume is not None and now >= life.resume:
                self._supervisor.signal(life.pid, signal.SIGCONT)
                life.resume = None
        if self._server_resume is None and _stopped(self._server.pid):
            self._server_resume = now + self._chance.uniform(0.02, 0.3)
        if self._server_resume is not None and now >= self._server_resume:
            self._server.send_signal(signal.SIGCONT)
            self._server_resume = None

    def _calm(self) -> None:
        """Ends all faults, then lets the workers come to their end."""
        self._line.calm()
        self._calls.calm()
        for life in self._lives.values():
            self._supervisor.signal(life.pid, signal.SIGCONT)
            self._supervisor.signal(life.pid, signal.SIGTERM)
        kill = monotonic() + 2 * LEASE_SECONDS
        end = monotonic() + _ENDING_SECONDS
        while self._lives and monotonic() < end:
            self._tend()
            if monotonic() > kill:  # it may wait for a round that nobody else joins any more
                for life in self._lives.values():
                    self._supervisor.signal(life.pid, signal.SIGKILL)
            sleep(_LOOK_SECONDS)
        if self._lives:
            self._problems.append(f"workers did not end: {self._lives}")
        until = monotonic() + 0.5
        while monotonic() < until:  # the server may have stopped itself just now
            self._tend()
            sleep(_LOOK_SECONDS)

    # --- what is left

    def _report(self, client: deltaserve.Client, watch: Watch) -> Report:
        model = client.model(MODEL)
        self._until_nobody_is_left(model)
        watch.wait(lambda: model.info().version)
        journals = Journals.read(self._journal(worker) for worker in WORKERS)
        verdict = judge(
            self._scenario,
            watch.events,
            journals,
            model.pull_state(),
            lambda session, sequence: ask(client, session, sequence),
        )
        verdict.problems += self._problems + watch.problems + self._census.problems
        verdict.figures |= self._census.figures()
        fired = self._fired + faults.fired(self._plan.folder / "server.faults")
        return Report(fired + faults.fired(self._plan.folder / "workers.faults"), journals.failures, verdict)

    def _until_nobody_is_left(self, model: deltaserve.Model) -> None:
        """Waits for the sessions of the dead to end; the server may still stop itself while it answers."""
        end = monotonic() + _ENDING_SECONDS
        while monotonic() < end:
            self._tend()
            if not model.info().sessions:
                return
            sleep(0.05)
        self._problems.append(f"sessions did not end: {model.info().sessions}")


def _stopped(pid: int) -> bool:
    text = Path(f"/proc/{pid}/stat").read_text()
    return text.rpartition(")")[2].split()[0] == "T"
