"""torch's own optimizer in the measuring process: the cost of a step without a server."""

import shutil
from collections.abc import Sequence

import torch

from benchmarks.baselines import Run
from benchmarks.models import Array

DEFAULT, FOREACH, COMPILED = (f"torch.optim.Adadelta, {kind}" for kind in ("default", "foreach", "compiled"))


def local_optimizers(weights: Sequence[Array], gradients: Sequence[Array]) -> dict[str, Run]:
    """Returns a step of torch's own optimizer by variant, the compiled one only if there is a compiler."""
    found: dict[str, Run] = {
        DEFAULT: local_optimizer(weights, gradients, None).step,
        FOREACH: local_optimizer(weights, gradients, True).step,
    }
    if shutil.which("g++"):
        found[COMPILED] = compiled = torch.compile(local_optimizer(weights, gradients, None).step)
        for _ in range(3):  # it compiles again when the state exists
            compiled()
    return found


def notes_on_local() -> tuple[str, ...]:
    """Returns a note about the compiled variant if it is missing."""
    return () if shutil.which("g++") else ("Compiled torch is not measured: torch.compile needs g++.",)


def local_optimizer(weights: Sequence[Array], gradients: Sequence[Array], foreach: bool | None) -> torch.optim.Adadelta:
    """Returns torch's own optimizer over a copy of the weights, with the gradients in place."""
    params = [torch.nn.Parameter(torch.from_numpy(array.copy())) for array in weights]
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = torch.from_numpy(gradient)
    return torch.optim.Adadelta(params, foreach=foreach)
