"""One update without a network: the store's kernel beside torch's own optimizer, on the CPU and on a GPU."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from benchmarks.models import SIZE_A, model_a
from benchmarks.timing import Timing, by_turns
from deltaserve_server.adadelta import Hyperparameters
from deltaserve_server.config import usable_threads
from deltaserve_server.memory import Budget, Range
from deltaserve_server.memory.host import HostStore


def cpu(rounds: int) -> dict[str, Timing]:
    """Times one update of 25,000,000 elements on the CPU."""
    threads = usable_threads()
    gradient = np.concatenate([array.ravel() for array in model_a().values()])
    source, target = np.ones(SIZE_A, np.float32), np.ones(SIZE_A, np.float32)
    with ThreadPoolExecutor(threads) as executor:
        contenders: dict[str, Callable[[], object]] = {
            "copy of 100 MB, one thread": lambda: np.copyto(target, source),
            "deltaserve, one thread": _host_update(gradient, executor, 1),
            f"deltaserve, {threads} threads": _host_update(gradient, executor, threads),
            "torch.optim.Adadelta, default": _torch_update(None),
            "torch.optim.Adadelta, foreach": _torch_update(True),
        }
        return by_turns(contenders, rounds)


def gpu(size: int, rounds: int) -> dict[str, Timing]:
    """Times one update of `size` elements on the GPU, queue to completion."""
    from deltaserve_server.adadelta import cuda

    weights, new_weights, gradient = (torch.randn(size, device="cuda") for _ in range(3))
    square_avg, acc_delta = (torch.zeros(size, device="cuda") for _ in range(2))
    param = torch.nn.Parameter(weights)
    param.grad = gradient
    squares = torch.empty(cuda.blocks(size), dtype=torch.float64, device="cuda")
    hyperparameters = Hyperparameters()
    contenders: dict[str, Callable[[], object]] = {
        "copy of the same bytes": _synchronized(lambda: _copy(weights, new_weights)),
        "deltaserve": _synchronized(
            lambda: cuda.update(gradient, 1.0, square_avg, acc_delta, weights, new_weights, squares, hyperparameters)
        ),
        "torch.optim.Adadelta, foreach": _synchronized(torch.optim.Adadelta([param], foreach=True).step),
        "torch.optim.Adadelta, compiled": _synchronized(
            torch.compile(torch.optim.Adadelta([param], capturable=True).step)
        ),
    }
    return by_turns(contenders, rounds, warmups=5)


def _host_update(gradient: np.ndarray, executor: ThreadPoolExecutor, threads: int) -> Callable[[], object]:
    store = HostStore(np.zeros(SIZE_A, np.float32), 0, Budget(1 << 40), executor, threads)
    ranges = [Range(0, SIZE_A, Hyperparameters())]

    def update() -> None:
        staging = store.stage()
        staging.add(0, gradient)
        store.fold(staging, 1.0)
        store.update(ranges, 1.0, store.current.number + 1)

    return update


def _torch_update(foreach: bool | None) -> Callable[[], object]:
    params = [torch.nn.Parameter(torch.from_numpy(array)) for array in model_a().values()]
    for param in params:
        param.grad = torch.randn_like(param)
    return torch.optim.Adadelta(params, foreach=foreach).step


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """Reads and writes 28 bytes an element: 8 by each of three copies, 4 by half of one."""
    for _ in range(3):
        target.copy_(source)
    half = source.numel() // 2
    target[:half].copy_(source[:half])


def _synchronized(run: Callable[[], object]) -> Callable[[], object]:
    def timed() -> None:
        run()
        torch.cuda.synchronize()

    return timed
