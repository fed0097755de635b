"""One update without a network: the kernel beside the speed of memory and torch's own optimizer."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import numba
import numpy as np

from benchmarks.baselines import Run, copy
from benchmarks.gpu import OPTIMIZERS
from benchmarks.local import local_optimizers, notes_on_local
from benchmarks.models import SHAPES_A, Array, Shape, elements, gradients_of, weights_of
from benchmarks.results import Timings
from benchmarks.timing import REST_SECONDS, by_turns
from deltaserve._common.optimizers import Adadelta, Optimizer
from deltaserve_server.config import usable_threads
from deltaserve_server.memory import Budget, Range, State
from deltaserve_server.memory.host import HostStore

LIMIT = "limit: the same bytes"
"""The bytes of an update, read and written in place with little arithmetic."""

KERNEL = "deltaserve's update"


def cpu(rounds: int, shapes: Sequence[Shape] = SHAPES_A, name: str = "adadelta") -> Timings:
    """Times one update on the CPU.

    Args:
        rounds: Number of rounds.
        shapes: The shapes of the model's tensors.
        name: A key of `gpu.OPTIMIZERS`.
    """
    threads, size = usable_threads(), elements(shapes)
    kind, options = OPTIMIZERS[name]
    optimizer = kind(**options)
    gradients = gradients_of(shapes)
    with ThreadPoolExecutor(threads) as executor:
        contenders = {
            LIMIT: _same_bytes(size, 1 + len(optimizer.slots), executor, threads),
            KERNEL: host_update(gradients, executor, threads, optimizer),
            f"{KERNEL}, one thread": host_update(gradients, executor, 1, optimizer),
            f"copy of {size * 4 / 1e6:.3g} MB": copy(size * 4, executor, threads),
            f"copy of {size * 4 / 1e6:.3g} MB, one thread": copy(size * 4, executor, 1),
            **local_optimizers(weights_of(shapes), gradients, kind.__name__, options),
        }
        title = f"kernel: one update of {size / 1e6:.3g} M parameters, {name}, CPU, {threads} threads"
        notes = (f"An update moves {12 + 8 * len(optimizer.slots)} bytes a parameter.", *notes_on_local())
        return Timings(title, LIMIT, by_turns(contenders, rounds, rest_seconds=REST_SECONDS), notes=notes)


def host_update(
    gradients: Sequence[Array], executor: ThreadPoolExecutor, threads: int, optimizer: Optimizer | None = None
) -> Run:
    """Returns an update as the server makes it, with the gradient as one chunk; None means Adadelta."""
    optimizer = optimizer or Adadelta()
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


def _same_bytes(size: int, changed: int, executor: ThreadPoolExecutor, threads: int) -> Run:
    """Returns a pass that reads a vector and changes others in place, as every update must: the limit of memory."""
    vectors = [np.zeros(size, np.float32) for _ in range(1 + changed)]
    functions: tuple[Callable[..., None], ...] = _change_1, _change_2, _change_3, _change_4
    compiled: Callable[..., None] = numba.njit(nogil=True, error_model="numpy")(functions[changed - 1])
    edges = [size * part // threads for part in range(threads + 1)]
    parts = [[vector[low:high] for vector in vectors] for low, high in pairwise(edges)]

    def run() -> None:
        for done in [executor.submit(compiled, *part) for part in parts]:
            done.result()

    return run


def _change_1(gradient: Array, weights: Array) -> None:
    for i in range(gradient.size):
        weights[i] += gradient[i]


def _change_2(gradient: Array, weights: Array, first: Array) -> None:
    for i in range(gradient.size):
        g = gradient[i]
        weights[i] += g
        first[i] += g


def _change_3(gradient: Array, weights: Array, first: Array, second: Array) -> None:
    for i in range(gradient.size):
        g = gradient[i]
        weights[i] += g
        first[i] += g
        second[i] += g


def _change_4(gradient: Array, weights: Array, first: Array, second: Array, third: Array) -> None:
    for i in range(gradient.size):
        g = gradient[i]
        weights[i] += g
        first[i] += g
        second[i] += g
        third[i] += g


@contextmanager
def kernel_alone(gradients: Sequence[Array]) -> Iterator[Run]:
    """Yields an update that uses all cores."""
    threads = usable_threads()
    with ThreadPoolExecutor(threads) as executor:
        yield host_update(gradients, executor, threads)
