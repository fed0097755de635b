"""One update without a network: the kernel beside the speed of memory and torch's own optimizer."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import numba
import numpy as np

from benchmarks.baselines import Run, copy
from benchmarks.local import local_optimizers, notes_on_local
from benchmarks.models import SHAPES_A, Array, Shape, elements, gradients_of, weights_of
from benchmarks.results import Timings
from benchmarks.timing import REST_SECONDS, by_turns
from deltaserve._common.optimizers import Adadelta
from deltaserve_server.config import usable_threads
from deltaserve_server.memory import Budget, Range, State
from deltaserve_server.memory.host import HostStore

LIMIT = "limit: the same 28 bytes a parameter"
"""The bytes of an update, read and written in place with little arithmetic."""

KERNEL = "deltaserve's update"


def cpu(rounds: int, shapes: Sequence[Shape] = SHAPES_A) -> Timings:
    """Times one update on the CPU."""
    threads, size = usable_threads(), elements(shapes)
    gradients = gradients_of(shapes)
    with ThreadPoolExecutor(threads) as executor:
        contenders = {
            LIMIT: _same_bytes(size, executor, threads),
            KERNEL: host_update(gradients, executor, threads),
            f"{KERNEL}, one thread": host_update(gradients, executor, 1),
            f"copy of {size * 4 / 1e6:.3g} MB": copy(size * 4, executor, threads),
            f"copy of {size * 4 / 1e6:.3g} MB, one thread": copy(size * 4, executor, 1),
            **local_optimizers(weights_of(shapes), gradients),
        }
        title = f"kernel: one update of {size / 1e6:.3g} M parameters, CPU, {threads} threads"
        return Timings(title, LIMIT, by_turns(contenders, rounds, rest_seconds=REST_SECONDS), notes=notes_on_local())


def host_update(gradients: Sequence[Array], executor: ThreadPoolExecutor, threads: int) -> Run:
    """Returns an update as the server makes it, with the gradient as one chunk."""
    optimizer = Adadelta()
    gradient = np.concatenate([array.ravel() for array in gradients])
    weights, *slots = (np.zeros(gradient.size, np.float32) for _ in range(1 + len(optimizer.slots)))
    store = HostStore(State(weights, tuple(slots)), 0, Budget(1 << 40), executor, threads)
    ranges = [Range(0, gradient.size, optimizer, optimizer.relevant_count(100))]

    def update() -> None:
        staging = store.stage()
        staging.add(0, gradient)
        store.fold(staging, 1.0)
        store.update(ranges, 1.0, store.current.number + 1)

    return update


def _same_bytes(size: int, executor: ThreadPoolExecutor, threads: int) -> Run:
    """Returns a pass that reads four vectors and writes three, as every update must: the limit of memory."""
    vectors = [np.zeros(size, np.float32) for _ in range(4)]
    compiled: Callable[..., None] = numba.njit(nogil=True, error_model="numpy")(_read_four_write_three)
    edges = [size * part // threads for part in range(threads + 1)]
    parts = [[vector[low:high] for vector in vectors] for low, high in pairwise(edges)]

    def run() -> None:
        for done in [executor.submit(compiled, *part) for part in parts]:
            done.result()

    return run


def _read_four_write_three(gradient: Array, square_avg: Array, acc_delta: Array, weights: Array) -> None:
    for i in range(gradient.size):
        g = gradient[i]
        square_avg[i] += g
        acc_delta[i] += g
        weights[i] += g


@contextmanager
def kernel_alone(gradients: Sequence[Array]) -> Iterator[Run]:
    """Yields an update that uses all cores."""
    threads = usable_threads()
    with ThreadPoolExecutor(threads) as executor:
        yield host_update(gradients, executor, threads)
