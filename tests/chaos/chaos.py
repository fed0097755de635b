"""`make chaos`: run after run with faults until enough of them have fired; prints what became of the pushes.

The status is 1 where anything that is promised did not hold; then the logs stay, and the command that runs it again is
said.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, fields
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any

from faults import all_faults
from scenarios import POLICIES, Scenario
from server_program import PLANTS

_DOORS = ("unary", "stream")
_RUN_SECONDS = 240
_MOST_RUNS = 4000
_SHOWN = 20


@dataclass(kw_only=True)
class Outcome:
    """What a run's process said."""

    policy: str
    door: str
    seed: int
    folder: Path
    fired: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    acknowledged: int = 0
    applied: int = 0
    lost: int = 0
    doubled: int = 0
    bits: int = 0
    problems: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options().parse_args(arguments)
    if options.one:
        return _run_here(options)
    began = monotonic()
    outcomes = list(_runs(options))
    print(f"seed {options.seed}: {len(outcomes)} runs in {monotonic() - began:.0f} s")
    print(table(outcomes))
    if options.json:
        options.json.write_text(json.dumps([_plain(outcome) for outcome in outcomes]))
    missing = _missing(outcomes, options)
    for fault in sorted(missing):
        print(f"never fired: {fault}")
    return 1 if _told(outcomes, options) or missing else 0


def table(outcomes: Sequence[Outcome]) -> str:
    """Returns how often each fault fired under each policy, and below it what became of the pushes there."""
    policies = [name for name in POLICIES if any(outcome.policy == name for outcome in outcomes)]
    columns = [[outcome for outcome in outcomes if outcome.policy == name] for name in policies]
    names = sorted({fault for outcome in outcomes for fault in outcome.fired})
    rows: list[tuple[str, list[int]]] = [
        (name, [sum(outcome.fired[name] for outcome in column) for column in columns]) for name in names
    ]
    rows.append(("fired, all", [sum(outcome.fired.total() for outcome in column) for column in columns]))
    for name in ("acknowledged", "applied", "lost", "doubled", "bits"):
        label = "bits that differ" if name == "bits" else name
        rows.append((label, [sum(getattr(outcome, name) for outcome in column) for column in columns]))
    rows.append(("other violations", [sum(len(outcome.problems) for outcome in column) for column in columns]))
    width = max(len(label) for label, _ in rows)
    lines = [" ".join([f"{'fault':{width}}", *(f"{name:>8}" for name in policies), f"{'all':>8}"])]
    for label, numbers in rows:
        if label == "fired, all":
            lines.append("-" * len(lines[0]))
        lines.append(" ".join([f"{label:{width}}", *(f"{number:8}" for number in numbers), f"{sum(numbers):8}"]))
    figures = sorted({name for outcome in outcomes for name in outcome.figures})
    for name in figures:
        most = [max((outcome.figures.get(name, 0.0) for outcome in column), default=0.0) for column in columns]
        row = [f"{'most: ' + name:{width}}", *(f"{value:8.2f}" for value in most), f"{max(most):8.2f}"]
        lines.append(" ".join(row))
    return "\n".join(lines)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000, help="go on until so many faults have fired")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="of faults in a run")
    parser.add_argument("--rate", type=float, default=1.0, help="how much more often than usual faults happen")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--doors", nargs="+", choices=_DOORS, default=list(_DOORS))
    parser.add_argument("--alternate", action="store_true", help="every policy through one door only, in turn")
    parser.add_argument("--jobs", type=int, default=(os.cpu_count() or 1) + 1, help="runs at a time")
    parser.add_argument("--plant", choices=PLANTS, default="none", help="a defect of the server")
    parser.add_argument(
        "--every-fault", action="store_true", help="go on until each has fired, and fail if one does not"
    )
    parser.add_argument("--json", type=Path, help="write the outcomes here")
    parser.add_argument("--folder", type=Path, help="where logs go; a new one by default")
    parser.add_argument("--one", action="store_true", help="one run in this process; prints JSON")
    return parser


def _run_here(options: argparse.Namespace) -> int:
    """Makes the run that the first policy and door name, and prints what became of it."""
    from scene import Plan, Scene

    scenario = Scenario(options.policies[0], options.doors[0])
    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    plan = Plan(
        scenario=scenario,
        seed=options.seed,
        seconds=options.seconds,
        rate=options.rate,
        plant=options.plant,
        folder=folder,
    )
    report = Scene(plan).run()
    print(json.dumps({"fired": report.fired, "failures": report.failures, **asdict(report.verdict)}))
    return 1 if report.verdict.problems else 0


def _runs(options: argparse.Namespace) -> Iterator[Outcome]:
    """Yields the outcomes of runs, several at a time, until enough faults have fired."""
    pairs = [(policy, door) for door in options.doors for policy in options.policies]
    if options.alternate:
        pairs = [(policy, _DOORS[index % 2]) for index, policy in enumerate(options.policies)]
    done: list[Outcome] = []
    waiting: set[Future[Outcome]] = set()
    with ThreadPoolExecutor(options.jobs) as threads:
        for index in count():
            enough = sum(outcome.fired.total() for outcome in done) >= options.trials
            enough = enough and not (options.every_fault and _missing(done, options))
            if index < len(pairs) or not (enough or index > _MOST_RUNS):
                policy, door = pairs[index % len(pairs)]
                waiting.add(threads.submit(_run, options, policy, door, 1000 * options.seed + index))
            elif not waiting:
                return
            if len(waiting) >= options.jobs or (index >= len(pairs) and enough):
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    outcome = future.result()
                    done.append(outcome)
                    print(_line(outcome), file=sys.stderr, flush=True)
                    yield outcome


def _run(options: argparse.Namespace, policy: str, door: str, seed: int) -> Outcome:
    folder = Path(tempfile.mkdtemp(prefix=f"chaos-{policy}-{door}-"))
    command = _command(options, policy, door, seed)
    outcome = Outcome(policy=policy, door=door, seed=seed, folder=folder)
    with (folder / "harness.err").open("wb") as errors:
        process = subprocess.Popen([*command, "--folder", str(folder)], stdout=subprocess.PIPE, stderr=errors)
        try:
            said, _ = process.communicate(timeout=_RUN_SECONDS)
            for name, value in json.loads(said).items():
                setattr(outcome, name, Counter(value) if name in ("fired", "failures") else value)
        except (subprocess.TimeoutExpired, ValueError) as error:
            process.kill()
            process.wait()
            outcome.problems.append(f"the harness itself failed: {error!r}")
    if not outcome.problems:
        shutil.rmtree(folder)
    return outcome


def _command(options: argparse.Namespace, policy: str, door: str, seed: int) -> list[str]:
    settings = {"--policies": policy, "--doors": door, "--seed": seed, "--seconds": options.seconds}
    settings |= {"--rate": options.rate, "--plant": options.plant}
    return [sys.executable, __file__, "--one", *(str(word) for pair in settings.items() for word in pair)]


def _missing(outcomes: Sequence[Outcome], options: argparse.Namespace) -> set[str]:
    """Returns the faults, whatever their action at a failpoint, that have never fired and are all to."""
    if not options.every_fault:
        return set()
    doors = {outcome.door for outcome in outcomes}
    wanted = {_kind(fault) for door in doors for fault in all_faults(door)}
    return wanted - {_kind(fault) for outcome in outcomes for fault in outcome.fired}


def _kind(fault: str) -> str:
    return fault.split()[0] if "." in fault else fault


def _line(outcome: Outcome) -> str:
    verdict = f"{len(outcome.problems)} violations" if outcome.problems else "all holds"
    counts = f"{outcome.fired.total():4} fired, {outcome.acknowledged:5} acknowledged, {outcome.applied:5} applied"
    return f"{outcome.policy:8} {outcome.door:6} seed {outcome.seed}: {counts}: {verdict}"


def _told(outcomes: Sequence[Outcome], options: argparse.Namespace) -> bool:
    """Says what is wrong and how to run it again; returns whether anything is."""
    wrong = [outcome for outcome in outcomes if outcome.problems]
    for outcome in wrong:
        again = shlex.join(_command(options, outcome.policy, outcome.door, outcome.seed))
        print(f"\n{outcome.policy} {outcome.door}, seed {outcome.seed}: logs in {outcome.folder}; again:\n  {again}")
        for problem in outcome.problems[:_SHOWN]:
            print(f"  {problem}")
        if len(outcome.problems) > _SHOWN:
            print(f"  and {len(outcome.problems) - _SHOWN} more")
    return bool(wrong)


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {entry.name: getattr(outcome, entry.name) for entry in fields(outcome)} | {"folder": str(outcome.folder)}


if __name__ == "__main__":
    sys.exit(main())
