"""Replays the updates in the server's log, with the gradients in the workers' journals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from history import History, Update
from scenarios import Gradient, GradientName, Push, Scenario, Vector

from deltaserve import Async, Contribution, ModelState, Optimizer, Sync
from deltaserve_server.optimizers import cpu, robust


@dataclass(frozen=True)
class Part:
    """One push of an update: the server's contribution, and the gradient that the worker sent."""

    contribution: Contribution
    content: Gradient


PushContent = tuple[Push, float]
"""A push and its gradient's norm. After a restart and an error, a worker may send another gradient in its place."""


class _State(NamedTuple):
    """A model's state at one version."""

    weights: Vector
    slots: Mapping[str, Vector]
    update_counts: list[int]

    @classmethod
    def before(cls, scenario: Scenario) -> "_State":
        """Returns the state before the first update."""
        slots = {slot.name: np.empty_like(scenario.initial) for slot in scenario.groups[0].slots}
        for spec, (start, stop) in zip(scenario.tensors, scenario.bounds, strict=True):
            for slot in scenario.groups[spec.group].slots:
                slots[slot.name][start:stop] = slot.initial
        return cls(scenario.initial.copy(), slots, [0] * len(scenario.tensors))

    def copy(self) -> "_State":
        slots = {name: vector.copy() for name, vector in self.slots.items()}
        return _State(self.weights.copy(), slots, list(self.update_counts))


class Oracle:
    """Computes the state that a model must have.

    Args:
        scenario: The model and its policy.
        sent: The gradient of each push.

    Attributes:
        checks: CRC-32 of the weights, by life and version.
        problems: Contradictions in the server's log.
    """

    def __init__(self, scenario: Scenario, sent: Mapping[PushContent, GradientName]) -> None:
        self._scenario = scenario
        self._sent = sent
        self._now = _State.before(scenario)
        self.checks: dict[tuple[int, int], int] = {}
        self.problems: list[str] = []

    @property
    def update_counts(self) -> list[int]:
        """Number of updates of each tensor."""
        return self._now.update_counts

    def replay(self, history: History) -> None:
        """Repeats every update, including lost ones, whose weights a worker may have received."""
        points = {life.start for life in history.lives}
        kept = {0: self._now.copy()}
        for index, life in enumerate(history.lives):
            self._now = kept[life.start].copy()
            self._record_check(index, life.start)
            for update in life.updates:
                if update.contributions:
                    self._update(update)
                self._record_check(index, update.version)
                if update.version in points:
                    kept[update.version] = self._now.copy()

    def _record_check(self, life: int, version: int) -> None:
        self.checks[life, version] = crc32(self._now.weights.tobytes())

    def different_bits(self, state: ModelState) -> int:
        """Returns the number of bits in which a model's state differs from the replay."""
        assert state.slots is not None
        assert state.slots.keys() == self._now.slots.keys()
        pairs = [(self._now.weights, state.weights)]
        pairs += [(vector, state.slots[name]) for name, vector in self._now.slots.items()]
        count = 0
        for mine, theirs in pairs:
            flat = np.concatenate([theirs[spec.name].reshape(-1) for spec in self._scenario.tensors])
            count += int(np.bitwise_count(mine.view(np.uint32) ^ flat.view(np.uint32)).sum())
        return count

    def _update(self, update: Update) -> None:
        scenario, now = self._scenario, self._now
        parts = [Part(one, scenario.gradient(self._sent[push, one.gradient_norm])) for push, one in update.parts]
        self._check(update, parts)
        absent = frozenset.intersection(*(part.content.absent for part in parts))
        gradient, divisor = self._reduce(parts)
        for index, (start, stop) in enumerate(scenario.bounds):
            if index in absent:
                continue
            now.update_counts[index] += 1
            optimizer = update.hyperparameters[scenario.tensors[index].group]
            new = np.empty(stop - start, np.float32)
            cpu.update(
                np.ascontiguousarray(gradient[start:stop]),
                divisor,
                [vector[start:stop] for vector in now.slots.values()],
                now.weights[start:stop],
                new,
                optimizer,
                optimizer.relevant_count(now.update_counts[index]),
            )
            now.weights[start:stop] = new

    def _reduce(self, parts: Sequence[Part]) -> tuple[Vector, float]:
        """Returns an update's gradient and its divisor, computed as `memory/host.py` documents."""
        policy = self._scenario.policy
        mean = not isinstance(policy, Sync) or policy.reduction == "mean"
        factors = [self._factor(part, mean) for part in parts]
        rows = [self._scenario.filled(part.content) for part in parts]
        if not mean:
            assert isinstance(policy, Sync)
            trim = (len(parts) - 1) // 2 if policy.reduction == "median" else policy.trim
            scaled = np.stack([row * np.float32(factor) for row, factor in zip(rows, factors, strict=True)])
            out = np.empty(self._scenario.size, np.float32)
            robust.trimmed_mean(scaled, trim, out)
            return out, 1.0
        weight = sum(part.content.weight for part in parts)
        if len(parts) == 1:
            return rows[0], weight / factors[0]
        total = np.zeros(self._scenario.size, np.float32)
        for row, factor in zip(rows, factors, strict=True):
            total += row * np.float32(factor)
        return total, weight

    def _factor(self, part: Part, mean: bool) -> float:
        policy = self._scenario.policy
        clip, norm = policy.clip_norm if isinstance(policy, Sync) else None, part.contribution.gradient_norm
        scale = clip / norm if clip is not None and norm > clip else 1.0
        return scale * part.content.weight if mean else scale

    def _check(self, update: Update, parts: Sequence[Part]) -> None:
        """Compares the server's report of an update with its pushes."""
        names = [part.contribution.worker for part in parts]
        if names != sorted(set(names)):
            self.problems.append(f"version {update.version}: not one push of each worker in order of names: {names}")
        for part in parts:
            norm = float(np.linalg.norm(self._scenario.filled(part.content).astype(np.float64)))
            reported = part.contribution
            if reported.weight != part.content.weight or abs(reported.gradient_norm - norm) > 1e-9 * norm:
                self.problems.append(f"version {update.version}: {reported} has another weight or norm than was sent")
        expected = self._hyperparameters(parts)
        if update.hyperparameters != expected:
            self.problems.append(f"version {update.version}: used {update.hyperparameters}, not {expected}")

    def _hyperparameters(self, parts: Sequence[Part]) -> tuple[Optimizer, ...]:
        given = (part.content.hyperparameters for part in parts if part.content.hyperparameters)
        carried: Any = next(given, self._scenario.groups)
        policy = self._scenario.policy
        divisor = 1 + parts[0].contribution.staleness if isinstance(policy, Async) and policy.damping else 1
        return tuple(replace(group, lr=group.lr / divisor) for group in carried)
