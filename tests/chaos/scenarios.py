"""Scenarios: models, policies, and gradients that anyone can recompute from their names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

import deltaserve
from deltaserve import SGD, Adagrad, AdamW, Async, Bounded, Optimizer, RMSprop, Sync, TensorSpec
from deltaserve._common.optimizers import OPTIMIZERS as KINDS

Vector = NDArray[np.float32]

MODEL = "m"
LEASE_SECONDS = 1.0

DURABILITIES = ("none", "snapshot", "journal", "fsync")
"""Durabilities of the server. With "none" it never dies."""

_OPTIMIZERS: Mapping[str, Optimizer] = {
    **{kind: make() for kind, make in KINDS.items()},
    "momentum": SGD(momentum=0.9, dampening=0.5),
    "nesterov": SGD(momentum=0.9, nesterov=True),
    "decay": Adagrad(lr_decay=0.1, initial_accumulator_value=0.5),
    "centered": RMSprop(momentum=0.9, centered=True),
    "amsgrad": AdamW(amsgrad=True),
}
OPTIMIZERS = tuple(_OPTIMIZERS)
"""Names of optimizers: every kind, and options."""

POLICIES: Mapping[str, deltaserve.Sync | deltaserve.Async | deltaserve.Bounded] = {
    "sync": Sync(),
    "quorum": Sync(min_workers=2, quorum=3, grace_seconds=0.02, round_timeout_seconds=0.4),
    "median": Sync(min_workers=2, reduction="median", clip_norm=2.0),
    "async": Async(),
    "stale": Async(max_staleness=2, damping=True),
    "bounded": Bounded(slack=1),
}

_SHAPES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "unary": {"a": (40, 50), "b": (7,), "c": (61, 43), "d": (), "e": (1500,)},
    "stream": {"a": (300, 700), "b": (90_001,), "c": (7,)},
}

_SPREAD = 1 << 16
"""Number of offsets in the pattern at which a gradient may start."""


@dataclass(frozen=True)
class Scenario:
    """One policy on one model with one optimizer.

    Attributes:
        policy_name: Key of POLICIES.
        door: How workers push: "unary", or "stream" with a model of more than 1 MiB.
        durability: One of DURABILITIES.
        optimizer_name: One of OPTIMIZERS.
    """

    policy_name: str
    door: str
    durability: str = "none"
    optimizer_name: str = "adadelta"

    @property
    def policy(self) -> deltaserve.Sync | deltaserve.Async | deltaserve.Bounded:
        return POLICIES[self.policy_name]

    @property
    def seen_by_workers(self) -> tuple[str, str, str]:
        """What a worker needs to know."""
        return self.policy_name, self.door, self.optimizer_name

    @property
    def groups(self) -> tuple[Optimizer, Optimizer]:
        """The optimizer of each parameter group."""
        first: Any = _OPTIMIZERS[self.optimizer_name]
        return first, replace(first, lr=first.lr / 2, weight_decay=0.01)

    @cached_property
    def carried(self) -> tuple[Optimizer, ...]:
        """The hyperparameters of pushes that carry their own."""
        groups: Any = self.groups
        return tuple(replace(group, lr=0.75 * group.lr, weight_decay=0.02) for group in groups)

    @property
    def mortal(self) -> bool:
        """Whether faults kill the server."""
        return self.durability != "none"

    @property
    def journals(self) -> bool:
        """Whether no announced version may be lost."""
        return self.durability in ("journal", "fsync")

    @cached_property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The layout; every second tensor belongs to the second group."""
        return tuple(TensorSpec(name, shape, i % 2) for i, (name, shape) in enumerate(_SHAPES[self.door].items()))

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """Start and end of each tensor in the flat vector."""
        sizes = [int(np.prod(spec.shape)) for spec in self.tensors]
        return [(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]

    @property
    def size(self) -> int:
        return self.bounds[-1][1]

    @cached_property
    def initial(self) -> Vector:
        return np.random.default_rng(7).standard_normal(self.size).astype(np.float32)

    @cached_property
    def _pattern(self) -> Vector:
        return np.random.default_rng(8).integers(-9, 10, self.size + _SPREAD).astype(np.float32)

    def cut(self, flat: Vector) -> dict[str, Vector]:
        """Splits a flat vector into its tensors."""
        parts = zip(self.tensors, self.bounds, strict=True)
        return {spec.name: flat[start:stop].reshape(spec.shape) for spec, (start, stop) in parts}

    def gradient(self, name: "GradientName") -> "Gradient":
        """Returns the gradient with a name, which depends on the name alone."""
        key = crc32("/".join(map(str, name)).encode())
        start = key % _SPREAD
        absent = frozenset({key // 7 % len(self.tensors)} if key % 7 == 0 else ())
        scale = np.float32(0.01 * (1 + key // 11 % 5))
        return Gradient(
            values=self._pattern[start : start + self.size] * scale,
            absent=absent,
            weight=0.5 * (1 + key // 13 % 5),
            hyperparameters=self.carried if key // 17 % 4 == 0 else None,
        )

    def gradient_norm(self, name: "GradientName") -> float:
        """Returns the L2 norm of a push of this gradient."""
        return float(np.linalg.norm(self.filled(self.gradient(name)).astype(np.float64)))

    def filled(self, gradient: "Gradient") -> Vector:
        """Returns a gradient's values with zeros for its absent tensors."""
        values = gradient.values.copy()
        for index in gradient.absent:
            start, stop = self.bounds[index]
            values[start:stop] = 0
        return values


class GradientName(NamedTuple):
    """Names a gradient: the worker, its life, and a number. All attempts to push a gradient keep its name."""

    worker: str
    life: int
    number: int


@dataclass(frozen=True)
class Gradient:
    """The content of a push.

    Attributes:
        values: The whole flat vector. The worker does not send the values of absent tensors.
        absent: Indices of tensors without a gradient.
        weight: As in `Worker.step`.
        hyperparameters: As in `Worker.step`.
    """

    values: Vector
    absent: frozenset[int]
    weight: float
    hyperparameters: tuple[Optimizer, ...] | None


class Push(NamedTuple):
    """Names a push: the worker, the session's id in hexadecimal digits, and the sequence number.

    Epochs are no part of it, because the server reuses those of sessions that a restart lost.
    """

    worker: str
    session: str
    sequence: int


@dataclass(kw_only=True)
class Plan:
    """The plan of a run.

    Attributes:
        scenario: Model, policy and durability.
        seed: Seed of all faults.
        seconds: Duration of the faults.
        rate: Factor of the usual rate of faults.
        defect: Key of DEFECTS, a planted defect of the server.
        folder: Folder of logs, journals and the server's data.
        first: Failpoints at which the server dies first.
    """

    scenario: Scenario
    seed: int
    seconds: float
    rate: float = 1.0
    defect: str = "none"
    folder: Path
    first: Sequence[str] = ()
