"""One update without a network: the kernel beside the speed of memory and torch's own optimizer."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import numba
import numpy as np
import torch

from benchmarks.baselines import Run, copy
from benchmarks.local import COMPILED, FOREACH, local_optimizers, notes_on_local
from benchmarks.models import SHAPES_A, Array, Shape, elements, gradients_of, weights_of
from benchmarks.results import Timings
from benchmarks.timing import REST_SECONDS, by_turns
from deltaserve_server.config import usable_threads
from deltaserve_server.memory import Budget, Range
from deltaserve_server.memory.host import HostStore
from deltaserve_server.optimizers import Hyperparameters

LIMIT = "limit: the same 28 bytes a parameter"
"""The bytes of an update: on the CPU read and written in place with little arithmetic, on a GPU copied."""

KERNEL = "deltaserve's update"
GPU_SIZES = (25_000_000, 1_000_000_000)


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
    gradient = np.concatenate([array.ravel() for array in gradients])
    store = HostStore(np.zeros(gradient.size, np.float32), 0, Budget(1 << 40), executor, threads)
    ranges = [Range(0, gradient.size, Hyperparameters())]

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


def gpu(size: int, rounds: int) -> Timings:
    """Times one update of `size` elements on the GPU, from its launch to its completion."""
    from deltaserve_server.optimizers import cuda

    weights, new_weights, gradient = (torch.randn(size, device="cuda") for _ in range(3))
    square_avg, acc_delta = (torch.zeros(size, device="cuda") for _ in range(2))
    param = torch.nn.Parameter(weights)
    param.grad = gradient
    squares = torch.empty(cuda.blocks(size), dtype=torch.float64, device="cuda")
    hyperparameters = Hyperparameters()
    contenders: dict[str, Callable[[], object]] = {
        LIMIT: _synchronized(lambda: _copy(weights, new_weights)),
        KERNEL: _synchronized(
            lambda: cuda.update(gradient, 1.0, square_avg, acc_delta, weights, new_weights, squares, hyperparameters)
        ),
        FOREACH: _synchronized(torch.optim.Adadelta([param], foreach=True).step),
        COMPILED: _synchronized(torch.compile(torch.optim.Adadelta([param], capturable=True).step)),
    }
    title = f"kernel: one update of {size / 1e6:,.0f} M parameters, {torch.cuda.get_device_name()}"
    return Timings(title, LIMIT, by_turns(contenders, rounds, warmups=5))


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """Moves 28 bytes per element, as an update does: 8 in each of three copies, 4 in half a copy."""
    for _ in range(3):
        target.copy_(source)
    half = source.numel() // 2
    target[:half].copy_(source[:half])


def _synchronized(run: Callable[[], object]) -> Callable[[], object]:
    def timed() -> None:
        run()
        torch.cuda.synchronize()

    return timed
