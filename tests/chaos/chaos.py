"""`make chaos`: runs with faults until enough of them have fired, and prints tables of the outcomes.

The exit status is 1 if any promise was broken. The logs of such a run stay, and the output has the command to repeat
it.
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
from dataclasses import astuple
from pathlib import Path
from queue import Empty
from time import monotonic

import run_program
from defects import DEFECTS
from outcomes import Outcome, tables
from scenarios import DURABILITIES, OPTIMIZERS, POLICIES, Plan, Scenario
from schedule import DOORS, Schedule, missing
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
    return 1 if _print_problems(outcomes) or wanting else 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000, help="run until this many faults have fired")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of the faults of a run")
    parser.add_argument("--rate", type=float, default=1.0, help="factor of the usual rate of faults")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--doors", nargs="+", choices=DOORS, default=list(DOORS))
    parser.add_argument("--durabilities", nargs="+", choices=DURABILITIES, default=list(DURABILITIES))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), help="one for a seed")
    parser.add_argument(
        "--alternate", action="store_true", help="combine each policy with one door and one durability, in turn"
    )
    parser.add_argument("--first", nargs="*", default=[], help="failpoints at which the server dies first")
    parser.add_argument("--jobs", type=int, default=(os.cpu_count() or 1) + 1, help="runs at a time")
    parser.add_argument("--defect", choices=DEFECTS, default="none", help="a planted defect of the server")
    parser.add_argument(
        "--every-fault", action="store_true", help="run until each fault has fired, and fail if one does not"
    )
    parser.add_argument("--json", type=Path, help="write the outcomes to this file")
    parser.add_argument("--folder", type=Path, help="folder for logs; a new one by default")
    parser.add_argument("--one", action="store_true", help="execute one run in this process and print JSON")
    return parser


def _run_here(options: argparse.Namespace) -> int:
    """Executes one run with the first policy, door, durability and optimizer, and prints its outcome."""
    scenario = Scenario(options.policies[0], options.doors[0], options.durabilities[0], options.optimizers[0])
    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    status = run_program.main([run_program.packed(_plan(options, scenario, options.seed, options.first, folder))])
    print((folder / run_program.OUTCOME).read_text())
    return status


def _runs(options: argparse.Namespace) -> Iterator[Outcome]:
    """Yields the outcomes of runs, several at a time, until enough faults have fired."""
    supervisor = Supervisor("run_program", Path(os.devnull))
    schedule = Schedule(options)
    running: dict[int, tuple[Outcome, float]] = {}
    while running or schedule.goes_on():
        while len(running) < options.jobs and schedule.goes_on():
            outcome, plan = _prepare(options, *schedule.next())
            running[supervisor.start([run_program.packed(plan)], {})] = outcome, monotonic() + _RUN_SECONDS
        for pid, (_, end) in running.items():
            if monotonic() > end:
                supervisor.signal(pid, signal.SIGKILL)
        with suppress(Empty):
            event = supervisor.events.get(timeout=1)
            outcome, _ = running.pop(event.pid)
            _read_outcome(outcome, event.status)
            schedule.ended(outcome)
            print(outcome.line(), file=sys.stderr, flush=True)
            yield outcome
    supervisor.close()


def _prepare(options: argparse.Namespace, scenario: Scenario, seed: int, first: Sequence[str]) -> tuple[Outcome, Plan]:
    policy, door, durability, optimizer = astuple(scenario)
    folder = Path(tempfile.mkdtemp(prefix=f"chaos-{policy}-{door}-{durability}-{optimizer}-"))
    settings = {"--policies": policy, "--doors": door, "--durabilities": durability}
    settings |= {"--optimizers": optimizer, "--seed": seed}
    settings |= {"--seconds": options.seconds, "--rate": options.rate, "--defect": options.defect}
    words = [str(word) for pair in settings.items() for word in pair]
    again = shlex.join([sys.executable, __file__, "--one", *words, *(["--first", *first] if first else [])])
    kind = {"policy": policy, "door": door, "durability": durability, "optimizer": optimizer}
    outcome = Outcome(**kind, seed=seed, folder=folder, again=again)
    return outcome, _plan(options, scenario, seed, first, folder)


def _plan(options: argparse.Namespace, scenario: Scenario, seed: int, first: Sequence[str], folder: Path) -> Plan:
    seconds, rate, defect = options.seconds, options.rate, options.defect
    return Plan(scenario=scenario, seed=seed, seconds=seconds, rate=rate, defect=defect, folder=folder, first=first)


def _read_outcome(outcome: Outcome, status: int) -> None:
    """Reads the outcome of a run, and removes its logs if there are no problems."""
    try:
        said = json.loads((outcome.folder / run_program.OUTCOME).read_text())
        for name, value in said.items():
            setattr(outcome, name, Counter(value) if name in ("fired", "failures") else value)
    except (OSError, ValueError):
        outcome.problems.append(f"the harness itself failed, with status {status}")
    if not outcome.problems:
        shutil.rmtree(outcome.folder)


def _print_problems(outcomes: Sequence[Outcome]) -> bool:
    """Prints all violations and the commands to repeat their runs; returns whether there are any."""
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
