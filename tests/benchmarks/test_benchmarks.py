"""The benchmarks run on tiny models, and their results become tables, verdicts and plots."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks import (
    compare,
    convergence_optimizers,
    document,
    durability,
    machine,
    memory,
    plots,
    scaling,
    step,
    targets,
    wire,
    workers,
)
from benchmarks.baselines import EMPTY_CALL, THERE_AND_BACK
from benchmarks.kernel import KERNEL
from benchmarks.models import SHAPES_A, SHAPES_B, SHAPES_C, SIZE_A, elements, gradients_of, shapes_of, weights_of
from benchmarks.peers.common import check
from benchmarks.peers.suite import PEERS
from benchmarks.processes import TCP
from benchmarks.results import Figures, Result, Timings, load, save
from benchmarks.timing import Timing, by_turns

from deltaserve_server import LocalServer
from deltaserve_server.recipes.data import Examples
from deltaserve_server.recipes.digits import Digits

_TINY = ((300, 1000), (5,))


def test_workloads_have_their_sizes() -> None:
    assert (elements(SHAPES_A), len(SHAPES_A)) == (25_000_000, 60)
    assert (elements(SHAPES_B), elements(SHAPES_C)) == (6, 1_000_000)


def test_contenders_take_turns_and_warm_ups_do_not_count() -> None:
    order: list[str] = []
    found = by_turns({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2, warmups=1)  # type: ignore[misc]
    assert "".join(order) == "ababab"
    assert [len(timing.seconds) for timing in found.values()] == [2, 2]


@pytest.mark.deep
def test_a_step_is_timed_beside_its_baselines() -> None:
    found = step.of_size(1000, fraction=0.01)
    assert isinstance(found, Timings)
    assert {THERE_AND_BACK, TCP.row, KERNEL} <= found.rows.keys()
    assert all(timing.spread[0] > 0 for timing in found.rows.values())


def test_a_size_without_memory_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: 1_000_000_000)
    found = step.of_size(1_000_000_000)
    assert isinstance(found, Figures)
    assert "Not measured" in found.markdown()


@pytest.mark.deep
def test_workers_lose_nothing_and_share_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_PROCESSES", 2)
    found = workers.by_count(1, 0.3, counts=(1, 3), shapes=_TINY)
    assert found.column(workers.LOST) == {"1 worker": 0, "3 workers": 0}
    assert all(rate > 0 for rate in found.column(workers.STEPS).values())
    assert all(0 <= share <= 1 for share in found.column(workers.SHARE).values())


@pytest.mark.deep
def test_every_durability_is_timed_beside_the_disk() -> None:
    found = durability.journals(1, shapes=_TINY)
    assert [*found.rows] == ["none", "journal", "fsync", durability.WRITE, durability.WRITE_AND_SYNC]
    written = re.search(r"none (\d+) MB, journal (\d+) MB, fsync (\d+) MB", found.notes[1])
    assert written
    assert int(written[1]) < 1 <= int(written[2])
    assert [*durability.snapshots(1, shapes=_TINY).rows] == ["none", "snapshot"]


@pytest.mark.deep
def test_workers_share_a_journal() -> None:
    found = durability.group_commit(1, 0.2, counts=(1, 2))
    assert all(rate > 0 for name in ("none", "journal", "fsync") for rate in found.rows[name] if rate is not None)


@pytest.mark.deep
def test_a_recovery_is_timed() -> None:
    found = durability.recovery(1, shapes=_TINY)
    assert 0 < found.rows[durability.FIRST_PUSH].median < 60


@pytest.mark.deep
def test_memory_has_a_row_for_every_scenario() -> None:
    found = memory.memory(1, _TINY, [TCP])
    assert len(found.rows) == 4
    assert all(0.1 < ratio < 3 for ratio in found.column(memory.RATIO).values())


def test_the_wire_carries_the_tensors_and_little_more() -> None:
    found = wire.wire(2, _TINY)
    assert all(0 < overhead < 1 for overhead in found.column(wire.OVERHEAD).values())


@pytest.mark.deep
@pytest.mark.timeout(600)
def test_two_checkouts_are_compared() -> None:
    """Both are this one, so that every figure is there; the ratios of so few rounds say nothing."""
    checkout = compare.Checkout(compare.ROOT)
    checkout.prepare()
    rounds = compare.Rounds(
        large=1, small=1, workers=1, workers_seconds=0.1, starts=1, imports=1, large_model="1000", workers_model="1000"
    )
    rows = dict(compare.compare({"this": checkout, "other": checkout}, rounds))
    assert len(rows) == 6
    # The ratio of processor time is not checked: it grows in steps of 10 ms.
    assert all(figure and figure > 0 for figures in rows.values() for figure in figures[:4])


def test_the_machine_has_its_vector_instructions() -> None:
    assert machine.describe()["vectors"] != "unknown"


def test_results_are_the_same_after_saving_and_loading(tmp_path: Path) -> None:
    results: dict[str, Result] = {
        "step-a": Timings("one", "x", {"x": Timing((1.0, 2.0)), "y": Timing((3.0, 4.0))}, "us", ("a note",)),
        "memory": Figures("two", ("MB", "of it"), {"idle": (1.0, None)}),
    }
    save(tmp_path / "run.json", {"cores": "2"}, results)
    assert load(tmp_path / "run.json") == ({"cores": "2"}, results)
    assert "| y | 3,500,000 | 3,000,000 to 4,000,000 | 2.33 |" in results["step-a"].markdown()
    assert "| idle | 1 |  |" in results["memory"].markdown()


@pytest.mark.deep
def test_optimizers_are_compared_by_policy_and_workers() -> None:
    scale = convergence_optimizers.Scale(seeds=2, steps=32, workers=(2, 4), step_seconds=0.001)
    random = np.random.default_rng(3)
    examples = Examples(features=random.random((64, 64), np.float32), labels=random.integers(0, 10, 64))
    lines: list[str] = []
    with LocalServer() as server:
        recipe = Digits(train=examples, test=examples, hidden=16)
        # No time is left for a second seed.
        runs = convergence_optimizers.measure(scale, recipe, server.target, 0.0, lines.append)
    assert {run.seed for run in runs} == {0}
    assert lines[-1].startswith("seed 0 is done after ")
    text = convergence_optimizers.tables(runs)
    for contender in convergence_optimizers.CONTENDERS:
        assert re.search(rf"\| {contender.name} \| sync, scaled \|  \| 0\.\d{{3}} ", text)
        assert f"{contender.name} {contender.lr:g} (chosen)" in text


def test_targets_are_met_missed_or_not_measured() -> None:
    rows = {THERE_AND_BACK: Timing((1.0,)), TCP.row: Timing((1.5,))}
    fine: dict[str, Result] = {"step-a": Timings("", THERE_AND_BACK, rows)}
    slow: dict[str, Result] = {"step-a": Timings("", THERE_AND_BACK, {**rows, TCP.row: Timing((1.7,))})}
    first = "A over TCP, of raw TCP there and back | <= 1.6"
    assert f"{first} | 1.5 | met |" in targets.table(fine)
    assert f"{first} | 1.7 | **missed** |" in targets.table(slow)
    assert targets.table({}).count("not measured") == len(targets.TARGETS)


def test_a_target_beside_peers_takes_the_best_of_those_over_tcp() -> None:
    over_tcp, not_over_tcp = (next(one.row for one in PEERS if one.over_tcp is over) for over in (True, False))
    rows = {TCP.row: Timing((0.7,)), over_tcp: Timing((1.0,)), not_over_tcp: Timing((0.5,))}
    table = targets.table({"peers-a": Timings("", TCP.row, rows)}, whole=False)
    assert "A over TCP, of the best peer over TCP | <= 0.8 | 0.7 | met" in table


def _costs() -> scaling.Costs:
    return scaling.Costs(
        call=1e-3, loopback=5e-10, worker=4e-10, server=6e-10, worker_call=4e-4, server_call=5e-4, kernel=6e-10
    )


def _measured(cost: scaling.Costs) -> dict[str, Result]:
    """Returns the results of a machine with exactly these costs."""
    side = 8 * SIZE_A
    used = {
        "large": ((cost.worker_call + side * cost.worker) * 1e3,
                  (cost.server_call + side * cost.server + scaling.CORES * cost.kernel * SIZE_A) * 1e3),
        "small": (cost.worker_call * 1e3, cost.server_call * 1e3),
    }  # fmt: skip
    large = {TCP.row: Timing((scaling.one_machine(cost, SIZE_A),)), KERNEL: Timing((cost.kernel * SIZE_A,))}
    return {
        "step-a": Timings("", KERNEL, large),
        "step-b": Timings("", EMPTY_CALL, {TCP.row: Timing((cost.call,))}),
        "step-1000000": Timings("", TCP.row, {TCP.row: Timing((2 * scaling.one_machine(cost, 1_000_000),))}),
        "step-processor": Figures("", ("worker ms", "server ms"), dict(used)),
    }


def test_scaling_computes_the_costs_behind_the_results() -> None:
    found = scaling.costs(_measured(_costs()))
    assert found is not None
    for name in ("call", "loopback", "worker", "server", "worker_call", "server_call", "kernel"):
        assert getattr(found, name) == pytest.approx(getattr(_costs(), name), rel=1e-6)
    assert "| -50% |" in scaling.report(_measured(_costs()))
    assert "nothing to predict from" in scaling.report({})


def test_scaling_names_the_bottleneck() -> None:
    slow, fast = (scaling.predict(_costs(), 1_000_000_000, 4, gigabits) for gigabits in (1, 100))
    assert (slow.limit, fast.limit) == ("network", "worker's side")
    assert slow.seconds == pytest.approx(2 * 4e9 / 1.25e8, rel=0.05)  # 4 GB each way at 125 MB/s
    costly = replace(_costs(), kernel=1e-7)
    assert scaling.predict(costly, 1_000_000_000, 1, 100).rate_limit == "kernel"
    assert scaling.predict(_costs(), 6, 64, 1).limit == "calls"


def test_plots_are_drawn(tmp_path: Path) -> None:
    lines = dict.fromkeys(("1 worker", "4 workers"), (100.0, 90.0, 110.0, 0.9, 0.0, 80.0, 200.0))
    many = Figures("", workers.COLUMNS, dict(lines))
    plots.draw({**_measured(_costs()), "workers-count": many}, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step.png", "workers.png"]


def test_the_check_of_peers_detects_a_lost_update() -> None:
    shapes = shapes_of("b")
    assert check("b", weights_of(shapes), 0)[0]
    assert not check("b", weights_of(shapes), 1)[0]
    assert not check("b", [np.full_like(array, np.nan) for array in gradients_of(shapes)], 0)[0]


def test_every_peer_has_an_adapter_and_packages() -> None:
    root = Path(__file__).parents[2]
    listed = re.search(r"^PEERS := (.*)$", (root / "Makefile").read_text(), re.MULTILINE)
    modules = {system.module for system in PEERS}
    assert listed
    assert set(listed[1].split()) == modules
    assert all((root / "benchmarks" / "peers" / f"{module}.py").exists() for module in modules)


@pytest.mark.deep
@pytest.mark.parametrize("workload", ["b", "c"])
def test_deltaserve_runs_as_a_peer(workload: str) -> None:
    command = [sys.executable, "-m", "benchmarks.peers.ours", "--workload", workload, "--quick"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=root, check=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    record = json.loads(done.stdout)
    assert record["correct"]
    assert record.get("lost", 0) == 0


def test_the_document_takes_the_results(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(document.FILE.read_text())
    document.fill(page, {"cores": "2"}, _measured(_costs()))
    document.fill(page, {"cores": "3"}, _measured(_costs()))
    text = page.read_text()
    assert "cores 3." in text
    assert "cores 2" not in text
    assert text.count("not measured |") == targets.table(_measured(_costs())).count("not measured |")
    page.write_text("nothing to fill")
    with pytest.raises(ValueError, match="one part named machine, found 0"):
        document.fill(page, {}, {})
