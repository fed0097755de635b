"""Runs the benchmarks: `python -m benchmarks [--json FILE] [--quick]`, or `python -m benchmarks convergence`."""

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import convergence, kernel, step
from benchmarks.timing import Timing, table

_GPU_SIZES = (25_000_000, 1_000_000_000)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A table: its title, what its ratios refer to, its unit, and what measures it in so many rounds."""

    title: str
    baseline: str
    rounds: int
    run: Callable[[int], dict[str, Timing]]
    unit: str = "ms"


def benchmarks() -> list[Benchmark]:
    """Returns what can be measured on this machine."""
    tcp = "100 MB there and back, raw TCP"
    found = [
        Benchmark("One update of 25 M parameters, CPU", "torch.optim.Adadelta, default", 11, kernel.cpu),
        Benchmark("Step of 25 M parameters, TCP", tcp, 11, lambda rounds: step.large(rounds, "cpu")),
        Benchmark("Step of 6 parameters, TCP", "unary gRPC call without work", 2000, step.small, "us"),
    ]
    if torch.cuda.is_available():
        found.append(Benchmark("Step of 25 M parameters, TCP", tcp, 11, lambda rounds: step.large(rounds, "cuda")))
        for size in _GPU_SIZES:
            title = f"One update of {size // 1_000_000} M parameters, {torch.cuda.get_device_name()}"
            found.append(Benchmark(title, "copy of the same bytes", 31, lambda rounds, n=size: kernel.gpu(n, rounds)))  # type: ignore[misc]
    return found


def main() -> None:
    """Measures, prints tables, and writes the figures where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE, in seconds")
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    parser.add_argument("--only", default="", metavar="TEXT", help="only tables whose title contains TEXT")
    study = parser.add_subparsers(dest="study", metavar="convergence").add_parser(
        "convergence", help=convergence.__doc__
    )
    convergence.add_arguments(study)
    arguments = parser.parse_args()
    if arguments.study:
        convergence.main(arguments)
        return
    figures: dict[str, dict[str, tuple[float, ...]]] = {}
    print(f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}\n")
    for benchmark in benchmarks():
        if arguments.only not in benchmark.title:
            continue
        timings = benchmark.run(max(benchmark.rounds // (10 if arguments.quick else 1), 3))
        print(f"{benchmark.title}\n\n{table(timings, benchmark.baseline, benchmark.unit)}\n", flush=True)
        figures[benchmark.title] = {name: timing.seconds for name, timing in timings.items()}
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
