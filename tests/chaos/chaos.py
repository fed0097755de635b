"""`make chaos`: run after run with faults until enough of them have fired; prints what became of the pushes.

The status is 1 where anything that is promised did not hold; then the logs stay, and the command that runs it again is
said.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty
from time import monotonic

import run_program
from course import DOORS, Course, missing
from outcomes import Outcome, tables
from plants import PLANTS
from scenarios import DURABILITIES, POLICIES, Plan, Scenario
from supervisor import Supervisor

_RUN_SECONDS = 240
_SHOWN = 20


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options().parse_args(arguments)
    if options.one:
        return _run_here(options)
    began = monotonic()
    outcomes = list(_runs(options))
    print(f"seed {options.seed}: {len(outcomes)} runs in {monotonic() - began:.0f} s")
    print(tables(outcomes))
    if options.json:
        options.json.write_text(json.dumps([outcome.plain() for outcome in outcomes]))
    wanting = missing(outcomes, options)
    for fault in sorted(wanting):
        print(f"never fired: {' '.join(fault)}")
    return 1 if _told(outcomes) or wanting else 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000, help="go on until so many faults have fired")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="of faults in a run")
    parser.add_argument("--rate", type=float, default=1.0, help="how much more often than usual faults happen")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--doors", nargs="+", choices=DOORS, default=list(DOORS))
    parser.add_argument("--durabilities", nargs="+", choices=DURABILITIES, default=list(DURABILITIES))
    parser.add_argument(
        "--alternate", action="store_true", help="every policy through one door and with one durability, in turn"
    )
    parser.add_argument("--first", nargs="*", default=[], help="where the server is to die before it does elsewhere")
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
    """Makes the run that the first policy, door and durability name, and prints what became of it."""
    scenario = Scenario(options.policies[0], options.doors[0], options.durabilities[0])
    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    status = run_program.main([run_program.packed(_plan(options, scenario, options.seed, options.first, folder))])
    print((folder / run_program.OUTCOME).read_text())
    return status


def _runs(options: argparse.Namespace) -> Iterator[Outcome]:
    """Yields the outcomes of runs, several at a time, until enough faults have fired."""
    supervisor = Supervisor("run_program", Path(os.devnull))
    course = Course(options)
    running: dict[int, tuple[Outcome, float]] = {}
    while running or course.goes_on():
        while len(running) < options.jobs and course.goes_on():
            outcome, plan = _begun(options, *course.next())
            running[supervisor.start([run_program.packed(plan)], {})] = outcome, monotonic() + _RUN_SECONDS
        for pid, (_, end) in running.items():
            if monotonic() > end:
                supervisor.signal(pid, signal.SIGKILL)
        with suppress(Empty):
            event = supervisor.events.get(timeout=1)
            outcome, _ = running.pop(event.pid)
            _take_note(outcome, event.status)
            course.ended(outcome)
            print(outcome.line(), file=sys.stderr, flush=True)
            yield outcome
    supervisor.close()


def _begun(options: argparse.Namespace, scenario: Scenario, seed: int, first: Sequence[str]) -> tuple[Outcome, Plan]:
    policy, door, durability = scenario.policy_name, scenario.door, scenario.durability
    folder = Path(tempfile.mkdtemp(prefix=f"chaos-{policy}-{door}-{durability}-"))
    settings = {"--policies": policy, "--doors": door, "--durabilities": durability, "--seed": seed}
    settings |= {"--seconds": options.seconds, "--rate": options.rate, "--plant": options.plant}
    words = [str(word) for pair in settings.items() for word in pair]
    again = shlex.join([sys.executable, __file__, "--one", *words, *(["--first", *first] if first else [])])
    outcome = Outcome(policy=policy, door=door, durability=durability, seed=seed, folder=folder, again=again)
    return outcome, _plan(options, scenario, seed, first, folder)


def _plan(options: argparse.Namespace, scenario: Scenario, seed: int, first: Sequence[str], folder: Path) -> Plan:
    seconds, rate, plant = options.seconds, options.rate, options.plant
    return Plan(scenario=scenario, seed=seed, seconds=seconds, rate=rate, plant=plant, folder=folder, first=first)


def _take_note(outcome: Outcome, status: int) -> None:
    """Reads what became of a run; where all is well, its logs go."""
    try:
        said = json.loads((outcome.folder / run_program.OUTCOME).read_text())
        for name, value in said.items():
            setattr(outcome, name, Counter(value) if name in ("fired", "failures") else value)
    except (OSError, ValueError):
        outcome.problems.append(f"the harness itself failed, with status {status}")
    if not outcome.problems:
        shutil.rmtree(outcome.folder)


def _told(outcomes: Sequence[Outcome]) -> bool:
    """Says what is wrong and how to run it again; returns whether anything is."""
    wrong = [outcome for outcome in outcomes if outcome.problems]
    for outcome in wrong:
        print(f"\n{outcome.line()}: logs in {outcome.folder}; again:\n  {outcome.again}")
        for problem in outcome.problems[:_SHOWN]:
            print(f"  {problem}")
        if len(outcome.problems) > _SHOWN:
            print(f"  and {len(outcome.problems) - _SHOWN} more")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
