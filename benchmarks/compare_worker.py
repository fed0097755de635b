"""A worker for `benchmarks.compare`: reads commands from standard input and answers each with one line of JSON.

It runs with the package of either checkout, so it uses only the public interface of `deltaserve`.
"""

import json
import sys
from contextlib import ExitStack
from time import monotonic, perf_counter

import deltaserve
from benchmarks.models import Tensors, gradients_of, named, shapes_of, weights_of

TRANSPORT_NAMES = {"tcp": ("stream",), "shared memory": ("shared", "shared_memory")}
"""The names that `Model.worker` has had for each transport."""


def main() -> None:
    """Joins the model of a workload and steps as the commands say.

    `steps N` answers with the seconds of each of N steps, `until T` with the number of steps made before the monotonic
    clock shows T. The end of the input ends the worker.
    """
    target, workload, transport = sys.argv[1:]
    gradients = named(gradients_of(shapes_of(workload)))
    with ExitStack() as stack:
        client = stack.enter_context(deltaserve.connect(target))
        model = client.create_model(f"{workload}-{transport.split()[0]}", named(weights_of(shapes_of(workload))))
        worker = stack.enter_context(_join(model, transport))
        for line in sys.stdin:
            command, _, number = line.partition(" ")
            answer: object = None
            if command == "steps":
                answer = [_timed(worker, gradients) for _ in range(int(number))]
            elif command == "until":
                answer = 0
                while monotonic() < float(number):
                    worker.step(gradients)
                    answer += 1
            print(json.dumps(answer), flush=True)


def _join(model: deltaserve.Model, transport: str) -> deltaserve.Worker:
    *older, newest = TRANSPORT_NAMES[transport]
    for name in older:
        try:
            return model.worker(transport=name)  # type: ignore[arg-type]  # a name of another checkout
        except ValueError:
            continue
    return model.worker(transport=newest)  # type: ignore[arg-type]


def _timed(worker: deltaserve.Worker, gradients: Tensors) -> float:
    started = perf_counter()
    worker.step(gradients)
    return perf_counter() - started


if __name__ == "__main__":
    main()
