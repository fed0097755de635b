"""One run: a server, workers and proxies between them; faults for a while, then quiet, then the verdict."""

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
from deck import Deck
from history import History
from observers import Promises, SessionObserver, SnapshotRequester, Watch, ask
from outcomes import Verdict
from rpc_proxy import RpcProxy
from scenarios import LEASE_SECONDS, MODEL, Plan
from server_host import GoneError, ServerHost
from supervisor import Supervisor
from tcp_proxy import TcpProxy
from verdict import Evidence, Journals, judge

import deltaserve

WORKERS = ("ada", "bob", "cyd", "dan")

_POLL_SECONDS = 0.01
_CALM_SECONDS = 0.6
_ENDING_SECONDS = 15.0


@dataclass
class Report:
    """The result of a run: how often each fault fired, the workers' errors, and the verdict."""

    fired: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    verdict: Verdict = field(default_factory=Verdict)


@dataclass
class _Life:
    """One process of a worker. `resume` is the time to continue it, if it was stopped."""

    worker: str
    pid: int
    since: float
    resume: float | None = None


class ChaosRun:
    """One run."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._scenario = plan.scenario
        self._random = random.Random(plan.seed)
        kinds = (*faults.SIGNALS, *faults.DEATHS, *faults.DEATHS) if plan.scenario.mortal else faults.SIGNALS
        self._signals = Deck(self._random, kinds)
        self._worker_faults = faults.worker_deck(self._random, plan.scenario.door)
        self._fired: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._lives: dict[int, _Life] = {}
        self._started = 0
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
        self._host = ServerHost(plan, self._note)
        stack.callback(self._host.close)
        client = stack.enter_context(deltaserve.connect(self._host.target, timeout_seconds=30))
        with self._tended():
            self._create(client)
            watch = Watch(self._host.target)
        self._sessions = SessionObserver(self._host.target, self._scenario, self._promises)
        self._open_proxies(stack, self._host.target)
        with self._snapshots():
            for worker in WORKERS:
                self._start(worker)
            self._make_faults()
        self._calm()
        self._sessions.close()
        return self._report(client, watch)

    # --- setup

    @contextmanager
    def _tended(self) -> Iterator[None]:
        """Restarts the server as needed while this thread waits for an answer."""
        done = threading.Event()

        def tend() -> None:
            with suppress(GoneError):  # the waiting thread times out and reports it
                while not done.wait(_POLL_SECONDS):
                    self._host.tend()

        thread = threading.Thread(target=tend, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    @contextmanager
    def _snapshots(self) -> Iterator[None]:
        """Requests snapshots at random times."""
        if not self._scenario.mortal:
            yield
            return
        requester = SnapshotRequester(self._host.target, self._plan.seed, self._promises)
        try:
            yield
        finally:
            with self._tended():
                requester.close()

    def _create(self, client: deltaserve.Client) -> None:
        scenario = self._scenario
        client.create_model(
            MODEL,
            scenario.cut(scenario.initial),
            groups=scenario.groups,
            group_of={spec.name: spec.group for spec in scenario.tensors},
            policy=scenario.policy,
        )

    def _open_proxies(self, stack: ExitStack, target: str) -> None:
        plan = self._plan
        self._line = TcpProxy(target, plan.seed, 10 / plan.rate * self._scenario.size * 4, self._note)
        stack.callback(self._line.close)
        self._calls = RpcProxy(target, plan.seed, 12 / plan.rate, self._note)
        stack.callback(self._calls.close)

    def _note(self, fault: str) -> None:
        with self._lock:
            self._fired[fault] += 1

    def _start(self, worker: str) -> None:
        plan = self._plan
        target = self._random.choice((self._line.target, self._calls.target))
        log = plan.folder / "workers.faults"
        pause = self._random.choice((0.0, 0.005, 0.02, 0.05))
        self._started += 1
        journal, scenario = str(self._journal(worker)), self._scenario
        transport = self._random.choice(("auto", "stream"))
        pid = self._supervisor.start(
            [worker, str(self._started), target, journal, *scenario.seen_by_workers, transport, str(pause)],
            faults.worker_environment(self._random, self._worker_faults, plan.rate, log),
        )
        self._lives[pid] = _Life(worker, pid, monotonic())

    def _journal(self, worker: str) -> Path:
        return self._plan.folder / f"{worker}.journal"

    # --- faults

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
                next_signal = now + self._random.expovariate(1.0 * self._plan.rate)
            sleep(_POLL_SECONDS)

    def _signal(self) -> None:
        """Injects one fault into a random worker or the server."""
        kind = self._signals.draw()
        if kind.endswith("server"):
            self._host.strike(kind)
            return
        running = [life for life in self._lives.values() if life.resume is None]
        if not running:
            return
        life = self._random.choice(running)
        self._note(f"signal {kind}")
        if kind == "kill worker":
            self._supervisor.signal(life.pid, signal.SIGKILL)
            life.resume = monotonic() + 60
        else:
            short, long = self._random.uniform(0.02, 0.5), self._random.uniform(1.3, 2.0) * LEASE_SECONDS
            self._supervisor.signal(life.pid, signal.SIGSTOP)
            life.resume = monotonic() + (short if kind.endswith("shortly") else long)

    def _tend(self) -> None:
        """Handles workers that ended or stopped, and continues those whose stop is over."""
        with suppress(Exception):
            while True:
                event = self._supervisor.events.get_nowait()
                life = self._lives.get(event.pid)
                if life and event.what == "ended":
                    del self._lives[event.pid]
                    self._sessions.silent(life.worker, event.at)
                    self._again.append((event.at + self._random.uniform(0.0, 0.4), life.worker))
                    # SIGTERM may arrive before the worker has set its handler.
                    if event.status not in (0, -signal.SIGKILL, -signal.SIGTERM):
                        self._problems.append(f"worker {life.worker} ended with status {event.status}")
                elif life and life.resume is None:  # a failpoint stopped it
                    life.resume = event.at + self._random.uniform(0.02, 2.0)
        now = monotonic()
        for life in self._lives.values():
            if life.resume is not None and now >= life.resume:
                self._supervisor.signal(life.pid, signal.SIGCONT)
                life.resume = None
        self._host.tend()

    def _calm(self) -> None:
        """Stops all faults, then lets the workers end."""
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
            if monotonic() > kill:  # it may wait for a round that no other worker joins
                for life in self._lives.values():
                    self._supervisor.signal(life.pid, signal.SIGKILL)
            sleep(_POLL_SECONDS)
        if self._lives:
            self._problems.append(f"workers did not end: {self._lives}")
        self._tend_for(0.5)  # a failpoint may have stopped the server just now

    def _tend_for(self, seconds: float) -> None:
        end = monotonic() + seconds
        while monotonic() < end:
            self._tend()
            sleep(_POLL_SECONDS)

    # --- verdict

    def _report(self, client: deltaserve.Client, watch: Watch) -> Report:
        with self._tended():
            model = client.model(MODEL)
            self._wait_for_sessions_to_end(model)
            watch.wait(lambda: model.info().version)
        self._host.restart()
        with self._tended():
            state = model.pull_state()
            journals = Journals.read(self._journal(worker) for worker in WORKERS)
            for seen in journals.seen:
                self._promises.record(seen.worker, seen.incarnation, seen.version, seen.durable)
            evidence = Evidence(
                scenario=self._scenario,
                history=History.read(self._host.log),
                journals=journals,
                events=watch.events,
                claims=self._promises.claims(),
                state=state,
                ask=lambda session, sequence: ask(client, session, sequence),
            )
            verdict = judge(evidence)
        verdict.problems += self._problems + self._host.problems + watch.problems + self._sessions.problems
        verdict.figures |= self._sessions.figures()
        return Report(self._all_fired(), journals.failures, verdict)

    def _all_fired(self) -> Counter[str]:
        logs = (self._plan.folder / name for name in ("server.faults", "workers.faults"))
        return sum(map(faults.fired, logs), self._fired)

    def _wait_for_sessions_to_end(self, model: deltaserve.Model) -> None:
        """Waits for the sessions of dead workers to end."""
        end = monotonic() + _ENDING_SECONDS
        while monotonic() < end:
            if not model.info().sessions:
                return
            sleep(0.05)
        self._problems.append(f"sessions did not end: {model.info().sessions}")
