"""An iteration of training in torch: forward, backward, and a step of a local or a remote optimizer."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

import torch

from benchmarks.local import DEFAULT
from benchmarks.processes import SHARED, TCP, server
from benchmarks.results import Timings
from benchmarks.timing import REST_SECONDS, by_turns
from deltaserve.torch import RemoteAdadelta

BACKWARD = "forward and backward alone"
LAYERS, WIDTH, BATCH = 8, 1024, 256


def training(rounds: int, layers: int = LAYERS, width: int = WIDTH) -> Timings:
    """Times an iteration of a network of linear layers; the server runs in another process."""
    optimizers: dict[str, tuple[Any, dict[str, Any]]] = {
        TCP.row: (TCP, {}),
        f"{TCP.row}, overlap": (TCP, {"overlap": True}),
        SHARED.row: (SHARED, {}),
    }
    with ExitStack() as stack:
        contenders: dict[str, Callable[[], object]] = {
            BACKWARD: _iteration(_network(layers, width), None),
            DEFAULT: _iteration(network := _network(layers, width), torch.optim.Adadelta(network.parameters())),
        }
        for row, (transport, options) in optimizers.items():
            target, _ = stack.enter_context(server(transport))
            network = _network(layers, width)
            remote = RemoteAdadelta(network.parameters(), target, model="bench", **transport.worker, **options)
            stack.enter_context(closing(remote))
            contenders[row] = _iteration(network, remote)
        size = sum(param.numel() for param in network.parameters())
        title = f"training: an iteration of {layers} linear layers, {size / 1e6:.3g} M parameters, batch {BATCH}"
        return Timings(title, BACKWARD, by_turns(contenders, rounds, rest_seconds=REST_SECONDS))


def _network(layers: int, width: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))


def _iteration(network: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> Callable[[], None]:
    batch = torch.randn(BATCH, next(network.parameters()).shape[1])

    def run() -> None:
        network.zero_grad()
        network(batch).square().mean().backward()
        if optimizer:
            optimizer.step()

    return run
