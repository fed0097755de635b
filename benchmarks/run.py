"""The command line of the benchmarks.

`python -m benchmarks` measures and prints tables. The other commands use the FILE that `--json` wrote: `plot` draws
plots, `scaling` predicts several machines, and `document` updates docs/performance.md. `convergence` is a separate
study. `python -m benchmarks.compare OTHER_CHECKOUT` compares two checkouts.
"""

import argparse
import compileall
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import deltaserve
import deltaserve_server
from benchmarks import (
    convergence,
    document,
    durability,
    gpu,
    kernel,
    machine,
    memory,
    plots,
    scaling,
    startup,
    step,
    targets,
    training,
    wire,
    workers,
)
from benchmarks.peers import suite as peers
from benchmarks.results import Result, Results, load, save

_PLOTS = Path("docs/performance")


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A table: its key, the number of rounds, and the function that measures it in that many rounds."""

    key: str
    rounds: int
    run: Callable[[int], Result]


def benchmarks(quick: bool, sizes: Sequence[int]) -> Iterator[Benchmark]:
    """Yields the benchmarks that can run on this machine, except those of the peers."""
    seconds = 1.0 if quick else 10.0
    yield Benchmark("kernel-cpu", 21, kernel.cpu)
    for name in gpu.OPTIMIZERS:
        if name != "adadelta":
            yield Benchmark(f"kernel-cpu-{name}", 21, partial(kernel.cpu, name=name))
    yield Benchmark("step-a", 21, step.large)
    yield Benchmark("step-b", 2000, step.small)
    for size in sizes:
        yield Benchmark(f"step-{size}", 10, lambda rounds, size=size: step.of_size(size, rounds / 10))  # type: ignore[misc]
    yield Benchmark("step-processor", 21, step.processor_time)
    yield Benchmark("training", 21, training.training)
    yield Benchmark("workers-c", 3, partial(workers.by_transport, seconds=seconds))
    yield Benchmark("workers-count", 3, partial(workers.by_count, seconds=seconds / 2))
    yield Benchmark("durability-snapshot", 10, durability.snapshots)
    yield Benchmark("durability-journal", 5, durability.journals)
    yield Benchmark("durability-workers", 3, partial(durability.group_commit, seconds=seconds / 2))
    yield Benchmark("durability-recovery", 200, durability.recovery)
    yield Benchmark("startup", 11, startup.startup)
    yield Benchmark("memory", 20, memory.memory)
    yield Benchmark("wire", 3, wire.wire)
    if torch.cuda.is_available():
        yield Benchmark("step-a-cuda", 21, partial(step.large, device="cuda"))
        for size, name in itertools.product(gpu.SIZES, gpu.OPTIMIZERS):
            yield Benchmark(gpu.key(name, size), 31, partial(gpu.update, name, size))


def measure(arguments: argparse.Namespace, described: Mapping[str, str]) -> Results:
    """Runs the selected benchmarks; prints and saves each table when it is done, so that a run can be stopped."""
    results: dict[str, Result] = {}

    def done(key: str, result: Result) -> None:
        results[key] = result
        _print_result(result)
        if arguments.json:
            save(arguments.json, described, results)

    for benchmark in benchmarks(arguments.quick, _sizes(arguments)):
        if benchmark.key.startswith(arguments.only):
            rounds = max(benchmark.rounds // 10, 2) if arguments.quick else benchmark.rounds
            done(benchmark.key, benchmark.run(rounds))
    if "peers".startswith(arguments.only[:5]):
        for key, result in peers.measure(arguments.quick, arguments.only):
            done(key, result)
    return results


def main(command: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    arguments = _parser().parse_args(command)
    arguments.act(arguments)


def _print_machine(described: Mapping[str, str]) -> None:
    print(f"{', '.join(f'{name} {value}' for name, value in described.items())}\n", flush=True)


def _print_result(result: Result) -> None:
    print(f"### {result.title}\n\n{result.markdown()}\n", flush=True)


def _measure(arguments: argparse.Namespace) -> None:
    described = {**machine.describe(), "torch": torch.__version__}
    _print_machine(described)
    _compile()
    results = measure(arguments, described)
    if not arguments.only:
        print(f"### targets\n\n{targets.table(results)}")
    elif any(target.measure(results) is not None for target in targets.TARGETS):
        print(f"### targets\n\n{targets.table(results, whole=False)}")
    elif not results:
        print(f"no table has a key that starts with {arguments.only!r}")


def _compile() -> None:
    """Writes the bytecode of deltaserve's modules, as pip does.

    Otherwise every timed process would compile them if the environment keeps Python from writing bytecode.
    """
    for package in (deltaserve, deltaserve_server):
        compileall.compile_dir(package.__path__[0], quiet=1)


def _plot(arguments: argparse.Namespace) -> None:
    plots.draw(load(arguments.file)[1], _PLOTS)


def _document(arguments: argparse.Namespace) -> None:
    _plot(arguments)
    document.fill(document.FILE, *load(arguments.file))


def _scaling(arguments: argparse.Namespace) -> None:
    print(scaling.report(load(arguments.file)[1]))


def _sizes(arguments: argparse.Namespace) -> Sequence[int]:
    if arguments.sizes is not None:
        return [int(size) for size in arguments.sizes.split(",")]
    return step.QUICK_SIZES if arguments.quick else step.FULL_SIZES if arguments.full else step.SIZES


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(act=_measure)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to FILE, timings in seconds")
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds, and fewer sizes")
    parser.add_argument(
        "--only", default="", metavar="KEY", help="only tables whose key starts with KEY: kernel, step-a, ..."
    )
    parser.add_argument("--sizes", metavar="N,N", help="sizes of the models in the tables step-N")
    parser.add_argument("--full", action="store_true", help="sizes up to 1 G parameters, if there is enough memory")
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, act, text in (
        ("plot", _plot, f"draw the plots into {_PLOTS}"),
        ("document", _document, f"draw the plots, and write tables, targets and predictions to {document.FILE}"),
        ("scaling", _scaling, scaling.__doc__),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("file", type=Path, metavar="FILE", help="a file that --json wrote")
        command.set_defaults(act=act)
    study = commands.add_parser("convergence", help=convergence.__doc__)
    convergence.add_arguments(study)
    study.set_defaults(act=convergence.main)
    return parser
