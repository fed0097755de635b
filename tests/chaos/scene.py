"""One run: a server, its workers and what lies between them; faults for a while, quiet, a look at what is left."""

import random
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep

import faults
from calls import Calls
from deck import Deck
from history import History
from host import GoneError, Host
from line import Line
from outcomes import Verdict
from scenarios import GROUPS, LEASE_SECONDS, MODEL, Plan
from supervisor import Supervisor
from verdict import Evidence, Journals, judge
from witness import Census, Promises, Savings, Watch, ask

import deltaserve

WORKERS = ("ada", "bob", "cyd", "dan")

_LOOK_SECONDS = 0.01
_CALM_SECONDS = 0.6
_ENDING_SECONDS = 15.0


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
        kinds = (*faults.SIGNALS, *faults.DEATHS, *faults.DEATHS) if plan.scenario.mortal else faults.SIGNALS
        self._signals = Deck(self._chance, kinds)
        self._worker_faults = faults.worker_deck(self._chance, plan.scenario.door)
        self._fired: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._lives: dict[int, _Life] = {}
        self._begun = 0
        self._again: list[tuple[float, str]] = []
        self._promises = Promises(plan.scenario)
        self._problems: list[str] = []

    def run(self) -> Report:
        with ExitStack() as stack:
            try:
                return self._run(stack)
            except (GoneError, deltaserve.Error):
                if not self._host.gone:
                    raise
                return Report(self._all_fired(), Counter(), Verdict(problems=[self._host.gone]))

    def _run(self, stack: ExitStack) -> Report:
        plan = self._plan
        self._supervisor = Supervisor("worker_program", plan.folder / "workers.err")
        stack.callback(self._supervisor.close)
        self._host = Host(plan, self._note)
        stack.callback(self._host.close)
        client = stack.enter_context(deltaserve.connect(self._host.target, timeout_seconds=30))
        with self._tended():
            self._create(client)
            watch = Watch(self._host.target)
        self._census = Census(self._host.target, self._scenario, self._promises)
        self._open_proxies(stack, self._host.target)
        with self._savings():
            for worker in WORKERS:
                self._start(worker)
            self._make_faults()
        self._calm()
        self._census.close()
        return self._report(client, watch)

    # --- what is there

    @contextmanager
    def _tended(self) -> Iterator[None]:
        """Keeps the server there while this thread waits for it."""
        done = threading.Event()

        def tend() -> None:
            with suppress(GoneError):  # it is found out by the other thread, who waits in vain
                while not done.wait(_LOOK_SECONDS):
                    self._host.tend()

        thread = threading.Thread(target=tend, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    @contextmanager
    def _savings(self) -> Iterator[None]:
        """Asks for snapshots meanwhile."""
        if not self._scenario.mortal:
            yield
            return
        savings = Savings(self._host.target, self._plan.seed, self._promises)
        try:
            yield
        finally:
            with self._tended():
                savings.close()

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
        transport = self._chance.choice(("auto", "stream"))
        pid = self._supervisor.start(
            [worker, str(self._begun), target, journal, scenario.policy_name, scenario.door, transport, str(pause)],
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
        if kind.endswith("server"):
            self._host.strike(kind)
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
        self._host.tend()

    def _calm(self) -> None:
        """Ends all faults, then lets the workers come to their end."""
        self._line.calm()
        self._calls.calm()
        self._host.calm()
        self._tend_for(_CALM_SECONDS)
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
        self._tend_for(0.5)  # the server may have stopped itself just now

    def _tend_for(self, seconds: float) -> None:
        end = monotonic() + seconds
        while monotonic() < end:
            self._tend()
            sleep(_LOOK_SECONDS)

    # --- what is left

    def _report(self, client: deltaserve.Client, watch: Watch) -> Report:
        with self._tended():
            model = client.model(MODEL)
            self._until_nobody_is_left(model)
            watch.wait(lambda: model.info().version)
        self._host.restart()
        with self._tended():
            state = model.pull_state()
            journals = Journals.read(self._journal(worker) for worker in WORKERS)
            for seen in journals.seen:
                self._promises.note(seen.worker, seen.incarnation, seen.version, seen.durable)
            evidence = Evidence(
                scenario=self._scenario,
                history=History.read(self._host.account),
                journals=journals,
                events=watch.events,
                claims=self._promises.claims(),
                state=state,
                ask=lambda session, sequence: ask(client, session, sequence),
            )
            verdict = judge(evidence)
        verdict.problems += self._problems + self._host.problems + watch.problems + self._census.problems
        verdict.figures |= self._census.figures()
        return Report(self._all_fired(), journals.failures, verdict)

    def _all_fired(self) -> Counter[str]:
        logs = (self._plan.folder / name for name in ("server.faults", "workers.faults"))
        return sum(map(faults.fired, logs), self._fired)

    def _until_nobody_is_left(self, model: deltaserve.Model) -> None:
        """Waits for the sessions of the dead to end."""
        end = monotonic() + _ENDING_SECONDS
        while monotonic() < end:
            if not model.info().sessions:
                return
            sleep(0.05)
        self._problems.append(f"sessions did not end: {model.info().sessions}")
