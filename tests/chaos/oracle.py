"""Replays the updates that a model says it has made, from what its workers wrote down of their pushes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np
from scenarios import GROUPS, Gradient, GradientName, Scenario, Vector

from deltaserve import Async, Contribution, Hyperparameters, ModelEvent, ModelState, Sync
from deltaserve_server.adadelta import Hyperparameters as Applied
from deltaserve_server.adadelta import cpu, robust


@dataclass(frozen=True)
class Part:
    """One push of an update: what the server told of it, and what it contained."""

    told: Contribution
    content: Gradient


class Oracle:
    """A model's numbers as they have to be.

    Args:
        scenario: Which model.
        sent: Which gradient a push holds, by worker, epoch and sequence number.

    Attributes:
        weights: The flat vector.
        square_avg: Likewise.
        acc_delta: Likewise.
        update_counts: By tensor.
        checks: By version: the CRC-32 of the weights.
        problems: What cannot be.
    """

    def __init__(self, scenario: Scenario, sent: Mapping[tuple[str, int, int], GradientName]) -> None:
        self._scenario = scenario
        self._sent = sent
        self.weights = scenario.initial.copy()
        self.square_avg = np.zeros_like(self.weights)
        self.acc_delta = np.zeros_like(self.weights)
        self.update_counts = [0] * len(scenario.tensors)
        self.checks = {0: crc32(self.weights.tobytes())}
        self.problems: list[str] = []

    def replay(self, events: Sequence[ModelEvent]) -> None:
        """Makes every update anew; the first event says where the model stood when nothing had happened."""
        version = 0
        for event in events[1:]:
            if event.missed or event.version != version + 1:
                self.problems.append(f"the watcher went from version {version} to {event.version}")
            version = event.version
            if event.contributions:
                self._update(event)
            self.checks[version] = crc32(self.weights.tobytes())

    def different_bits(self, state: ModelState) -> int:
        """Returns in how many bits a model's numbers are not those of the replay."""
        assert state.square_avg is not None
        assert state.acc_delta is not None
        pairs = (
            (self.weights, state.weights),
            (self.square_avg, state.square_avg),
            (self.acc_delta, state.acc_delta),
        )
        count = 0
        for mine, theirs in pairs:
            flat = np.concatenate([theirs[spec.name].reshape(-1) for spec in self._scenario.tensors])
            count += int(np.bitwise_count(mine.view(np.uint32) ^ flat.view(np.uint32)).sum())
        return count

    def _update(self, event: ModelEvent) -> None:
        scenario = self._scenario
        names = [self._sent[told.worker, told.epoch, told.sequence] for told in event.contributions]
        parts = [Part(told, scenario.gradient(name)) for told, name in zip(event.contributions, names, strict=True)]
        self._check(event, parts)
        absent = frozenset.intersection(*(part.content.absent for part in parts))
        gradient, divisor = self._reduce(parts)
        for index, (start, stop) in enumerate(scenario.bounds):
            if index in absent:
                continue
            self.update_counts[index] += 1
            group = event.hyperparameters[scenario.tensors[index].group]
            new = np.empty(stop - start, np.float32)
            cpu.update(
                np.ascontiguousarray(gradient[start:stop]),
                divisor,
                self.square_avg[start:stop],
                self.acc_delta[start:stop],
                self.weights[start:stop],
                new,
                Applied(
                    lr=group.lr,
                    rho=group.rho,
                    eps=group.eps,
                    weight_decay=group.weight_decay,
                    maximize=group.maximize,
                ),
            )
            self.weights[start:stop] = new

    def _reduce(self, parts: Sequence[Part]) -> tuple[Vector, float]:
        """Returns an update's gradient and what it is to be divided by, as `memory/host.py` says that it is done."""
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
        clip, norm = policy.clip_norm if isinstance(policy, Sync) else None, part.told.gradient_norm
        scale = clip / norm if clip is not None and norm > clip else 1.0
        return scale * part.content.weight if mean else scale

    def _check(self, event: ModelEvent, parts: Sequence[Part]) -> None:
        """Compares what the server tells of an update with what follows from its pushes."""
        names = [part.told.worker for part in parts]
        if names != sorted(set(names)):
            self.problems.append(f"version {event.version}: not one push of each worker in order of names: {names}")
        for part in parts:
            norm = float(np.linalg.norm(self._scenario.filled(part.content).astype(np.float64)))
            if part.told.weight != part.content.weight or abs(part.told.gradient_norm - norm) > 1e-9 * norm:
                self.problems.append(f"version {event.version}: {part.told} has another weight or norm than was sent")
        expected = self._hyperparameters(parts)
        if event.hyperparameters != expected:
            self.problems.append(f"version {event.version}: used {event.hyperparameters}, not {expected}")

    def _hyperparameters(self, parts: Sequence[Part]) -> tuple[Hyperparameters, ...]:
        carried = next((part.content.hyperparameters for part in parts if part.content.hyperparameters), GROUPS)
        policy = self._scenario.policy
        divisor = 1 + parts[0].told.staleness if isinstance(policy, Async) and policy.damping else 1
        return tuple(replace(group, lr=group.lr / divisor) for group in carried)
