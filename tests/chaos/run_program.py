"""Executes one run in a process of its own, and writes its outcome to a file."""

import json
import os
from dataclasses import asdict, astuple
from pathlib import Path

from chaos_run import ChaosRun
from scenarios import Plan, Scenario

OUTCOME = "outcome.json"


def main(arguments: list[str]) -> int:
    """Executes the run of an argument from `packed`."""
    settings = json.loads(arguments[0])
    folder = Path(settings.pop("folder"))
    plan = Plan(scenario=Scenario(*settings.pop("scenario")), folder=folder, **settings)
    errors = os.open(folder / "harness.err", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(errors, 2)
    report = ChaosRun(plan).run()
    outcome = {"fired": report.fired, "failures": report.failures, **asdict(report.verdict)}
    (folder / OUTCOME).write_text(json.dumps(outcome))
    return 1 if report.verdict.problems else 0


def packed(plan: Plan) -> str:
    """Returns a plan as an argument of `main`."""
    kind = astuple(plan.scenario)
    return json.dumps({**vars(plan), "scenario": kind, "folder": str(plan.folder), "first": list(plan.first)})
