"""torch's own optimizer in the measuring process: the cost of a step without a server."""

import inspect
import shutil
from collections.abc import Mapping, Sequence

import torch

from benchmarks.baselines import Run
from benchmarks.models import Array

_KINDS = "default", "foreach", "compiled"

DEFAULT, FOREACH, COMPILED = (f"torch.optim.Adadelta, {kind}" for kind in _KINDS)


def local_optimizers(
    weights: Sequence[Array],
    gradients: Sequence[Array],
    name: str = "Adadelta",
    options: Mapping[str, object] | None = None,
) -> dict[str, Run]:
    """Returns a step of torch's own optimizer by variant: fused where torch has it, compiled if there is a compiler.

    Args:
        weights: The weights; copied.
        gradients: The gradients; used in place.
        name: The optimizer's name in `torch.optim`.
        options: Its arguments.
    """
    kind, made = getattr(torch.optim, name), dict(options or {})
    rows = {
        variant: f"torch.optim.{name}{''.join(f', {key}={made[key]}' for key in made)}, {variant}"
        for variant in (*_KINDS, "fused")
    }
    found: dict[str, Run] = {
        rows["default"]: kind(_parameters(weights, gradients), foreach=False, **made).step,
        rows["foreach"]: kind(_parameters(weights, gradients), foreach=True, **made).step,
    }
    if "fused" in inspect.signature(kind).parameters:
        found[rows["fused"]] = kind(_parameters(weights, gradients), fused=True, **made).step
    if shutil.which("g++"):
        compiled: Run = torch.compile(kind(_parameters(weights, gradients), **made).step)
        for _ in range(3):  # it compiles again when the state exists
            compiled()
        found[rows["compiled"]] = compiled
    return found


def notes_on_local() -> tuple[str, ...]:
    """Returns a note about the compiled variant if it is missing."""
    return () if shutil.which("g++") else ("Compiled torch is not measured: torch.compile needs g++.",)


def local_optimizer(weights: Sequence[Array], gradients: Sequence[Array], foreach: bool | None) -> torch.optim.Adadelta:
    """Returns torch's own Adadelta over a copy of the weights, with the gradients in place."""
    return torch.optim.Adadelta(_parameters(weights, gradients), foreach=foreach)


def _parameters(weights: Sequence[Array], gradients: Sequence[Array]) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.from_numpy(array.copy())) for array in weights]
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = torch.from_numpy(gradient)
    return params
