"""One update on a GPU without a network: each optimizer beside the speed of a copy and torch's own optimizer."""

import inspect
from collections.abc import Callable, Mapping

import torch

from benchmarks.results import Timings
from benchmarks.timing import by_turns
from deltaserve._common.optimizers import SGD, Adadelta, Adagrad, Adam, AdamW, Optimizer, RMSprop

SIZES = (25_000_000, 1_000_000_000)

OPTIMIZERS: Mapping[str, tuple[type[Optimizer], Mapping[str, object]]] = {
    "adadelta": (Adadelta, {}),
    "sgd": (SGD, {}),
    "momentum": (SGD, {"momentum": 0.9}),
    "adagrad": (Adagrad, {}),
    "rmsprop": (RMSprop, {}),
    "rmsprop-centered": (RMSprop, {"centered": True, "momentum": 0.9}),
    "adam": (Adam, {}),
    "adamw": (AdamW, {}),
    "adamw-amsgrad": (AdamW, {"amsgrad": True}),
}
"""What is measured by name: a class, whose name is also that of torch's, and the options of both."""

LIMIT = "limit: a copy of the same bytes"
KERNEL = "deltaserve's update"
FOREACH, FUSED, COMPILED = (f"torch's optimizer, {kind}" for kind in ("foreach", "fused", "compiled"))


def key(name: str, size: int) -> str:
    """Returns the key of the timings of an optimizer in `OPTIMIZERS`."""
    return f"kernel-gpu-{name}-{size}"


def update(name: str, size: int, rounds: int) -> Timings:
    """Times one update of `size` elements, from its launch to its completion.

    Args:
        name: A key of `OPTIMIZERS`.
        size: Number of elements.
        rounds: Number of rounds.
    """
    kind, options = OPTIMIZERS[name]
    optimizer = kind(**options)
    weights, new_weights, gradient = (torch.randn(size, device="cuda") for _ in range(3))
    contenders = {
        LIMIT: _copy(weights, new_weights, 3 + 2 * len(optimizer.slots)),
        KERNEL: _ours(optimizer, gradient, weights, new_weights),
        **_torchs(kind.__name__, options, weights, gradient),
    }
    title = f"kernel: one update of {size / 1e6:,.0f} M parameters, {name}, {torch.cuda.get_device_name()}"
    timed = {row: _synchronized(run) for row, run in contenders.items()}
    return Timings(title, LIMIT, by_turns(timed, rounds, warmups=5))


def _ours(
    optimizer: Optimizer, gradient: torch.Tensor, weights: torch.Tensor, new_weights: torch.Tensor
) -> Callable[[], object]:
    from deltaserve_server.optimizers import cuda  # imports Triton, which a machine without a GPU may lack

    slots = [torch.zeros_like(weights) for _ in optimizer.slots]
    squares = torch.empty(cuda.blocks(weights.numel()), dtype=torch.float64, device="cuda")
    count = optimizer.relevant_count(100)
    return lambda: cuda.update(gradient, 1.0, slots, weights, new_weights, squares, optimizer, count)


def _torchs(
    name: str, options: Mapping[str, object], weights: torch.Tensor, gradient: torch.Tensor
) -> dict[str, Callable[[], object]]:
    """Returns torch's own step by variant, as far as the optimizer has them."""
    kind = getattr(torch.optim, name)
    accepted = inspect.signature(kind).parameters
    param = torch.nn.Parameter(weights)
    param.grad = gradient
    capturable = {"capturable": True} if "capturable" in accepted else {}
    steps = {
        FOREACH: kind([param], foreach=True, **options).step,
        COMPILED: torch.compile(kind([param], **capturable, **options).step),
    }
    if "fused" in accepted:
        steps[FUSED] = kind([param], fused=True, **options).step
    return steps


def _copy(source: torch.Tensor, target: torch.Tensor, vectors: int) -> Callable[[], object]:
    """Returns copies that move the bytes of so many vectors: two in each whole copy, one in half a copy."""
    half = source.numel() // 2

    def run() -> None:
        for _ in range(vectors // 2):
            target.copy_(source)
        if vectors % 2:
            target[:half].copy_(source[:half])

    return run


def _synchronized(run: Callable[[], object]) -> Callable[[], object]:
    def timed() -> None:
        run()
        torch.cuda.synchronize()

    return timed
