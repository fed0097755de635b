"""One run in a process of its own; writes down what became of it."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from scenarios import Plan, Scenario
from scene import Scene

OUTCOME = "outcome.json"


def main(arguments: list[str]) -> int:
    """Makes the run that the argument says, which is from `packed`."""
    settings = json.loads(arguments[0])
    folder = Path(settings.pop("folder"))
    plan = Plan(scenario=Scenario(*settings.pop("scenario")), folder=folder, **settings)
    errors = os.open(folder / "harness.err", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(errors, 2)
    report = Scene(plan).run()
    said = {"fired": report.fired, "failures": report.failures, **asdict(report.verdict)}
    (folder / OUTCOME).write_text(json.dumps(said))
    return 1 if report.verdict.problems else 0


def packed(plan: Plan) -> str:
    """Returns what `main` takes."""
    scenario = plan.scenario
    kind = scenario.policy_name, scenario.door, scenario.durability
    return json.dumps({**vars(plan), "scenario": kind, "folder": str(plan.folder), "first": list(plan.first)})
