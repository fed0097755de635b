"""Vectors on a GPU: weights and optimizer state live there, what travels lies in pinned host memory.

Three streams: gradients go up while they are received, the kernel runs on one part of the vector while the new weights
of the part before come down.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch

from deltaserve_server.adadelta import Hyperparameters, cuda
from deltaserve_server.memory.budget import Allowance, Budget
from deltaserve_server.memory.store import ELEMENT_BYTES, Pool, Range, Staging, State, Store, Vector, Version

_PIECE = 1 << 22
"""Elements that are updated, and then copied down, at a time: 16 MiB, long enough to keep either side busy."""


class DeviceStaging(Staging):
    """A push's values on their way up: through pinned memory, without waiting for the copy.

    Args:
        size: Elements of the flat vector.
        upload: The stream that copies.
    """

    def __init__(self, size: int, upload: torch.cuda.Stream) -> None:
        self._upload = upload
        self._pinned = torch.empty(size, dtype=torch.float32, pin_memory=True)
        self._host: Vector = self._pinned.numpy()
        with torch.cuda.stream(upload):
            self.values = torch.empty(size, dtype=torch.float32, device="cuda")
        self.covered: list[tuple[int, int]] = []

    def add(self, offset: int, values: Vector) -> None:
        """Copies the piece and sends it up."""
        stop = offset + values.size
        self._host[offset:stop] = values
        with torch.cuda.stream(self._upload):
            self.values[offset:stop].copy_(self._pinned[offset:stop], non_blocking=True)
        self.covered.append((offset, stop))

    def used_by(self, stream: torch.cuda.Stream) -> None:
        """Lets `stream` read the values: it waits for the copy, and the memory is not used again before it is done."""
        stream.wait_stream(self._upload)
        self.values.record_stream(stream)

    def lengthen(self, size: int) -> None:
        """Adds zeros up to `size` elements, where the layout was extended since the push came."""
        missing = size - self.values.numel()
        if missing:
            self.values = torch.cat([self.values, torch.zeros(missing, device="cuda")])

    def zero_gaps(self) -> None:
        """Writes zeros where no value came."""
        edges = [0, *(edge for part in self.covered for edge in part), self.values.numel()]
        for start, stop in list(pairwise(edges))[::2]:
            self.values[start:stop].zero_()


class DeviceStore(Store):
    """A model's vectors on the current GPU; versions are published in pinned host memory.

    Args:
        weights: The initial weights.
        number: Their version.
        budget: Where readers of older versions take their memory from.
    """

    def __init__(self, weights: Vector, number: int, budget: Budget) -> None:
        self._budget = budget
        self._upload, self._compute, self._download = (torch.cuda.Stream() for _ in range(3))
        self._staged: DeviceStaging | None = None
        self._folds = 0
        self._weights: torch.Tensor
        self._next: torch.Tensor
        self._pool: Pool
        self._readers: Allowance
        self._load(State(weights, np.zeros_like(weights), np.zeros_like(weights)))
        self.current = Version(number, self._pinned_copy(), self._readers, self._pool)

    def stage(self) -> DeviceStaging:
        """Returns a place for a push's values."""
        return DeviceStaging(self._weights.numel(), self._upload)

    def staging_bytes(self, elements: int) -> int:
        """Returns the size of the whole vector, pinned and on the device, however little of it comes."""
        return 2 * self._weights.numel() * ELEMENT_BYTES

    def fold(self, staging: Staging) -> None:
        """Adds a push to the sum, which the first one's own memory becomes."""
        assert isinstance(staging, DeviceStaging)
        self._folds += 1
        with torch.cuda.stream(self._compute):
            staging.used_by(self._compute)
            staging.lengthen(self._weights.numel())
            if self._staged is None:
                self._staged = staging
                return
            if self._folds == 2:  # from here on every element counts, also where the first had none
                self._staged.zero_gaps()
            for start, stop in staging.covered:
                self._staged.values[start:stop].add_(staging.values[start:stop])
        self._compute.synchronize()

    def update(self, ranges: Sequence[Range], contributors: int, number: int) -> None:
        """Applies the folded sum part by part, each followed by its copy to the host, and publishes the version."""
        assert self._staged is not None
        host = self._pool.take()
        for start, stop, hyperparameters in _parts(ranges, self._weights.numel()):
            with torch.cuda.stream(self._compute):
                self._update(start, stop, hyperparameters, float(contributors))
            self._download.wait_stream(self._compute)
            with torch.cuda.stream(self._download):
                torch.from_numpy(host[start:stop]).copy_(self._next[start:stop], non_blocking=True)
        self._download.synchronize()
        self._weights, self._next = self._next, self._weights
        self._staged, self._folds = None, 0
        self._publish(host, number)

    def state(self) -> State:
        """Returns a copy of the three vectors."""
        vectors = (self._weights, self._square_avg, self._acc_delta)
        return State(*(vector.cpu().numpy() for vector in vectors))

    def put(self, state: State, number: int) -> None:
        """Replaces the three vectors."""
        self._load(state)
        self._publish(self._pinned_copy(), number)

    def extend(self, weights: Vector) -> None:
        """Adds elements with zero state at the end."""
        held = self.state()
        zeros = np.zeros_like(weights)
        self._load(
            State(
                np.concatenate([held.weights, weights]),
                np.concatenate([held.square_avg, zeros]),
                np.concatenate([held.acc_delta, zeros]),
            )
        )
        if self._staged is not None:
            with torch.cuda.stream(self._compute):
                self._staged.lengthen(self._weights.numel())
            self._compute.synchronize()
        self._publish(self._pinned_copy(), self.current.number)

    def _update(self, start: int, stop: int, hyperparameters: Hyperparameters | None, divisor: float) -> None:
        """Updates one part, or keeps it where there are no hyperparameters."""
        if hyperparameters is None:
            self._next[start:stop].copy_(self._weights[start:stop])
            return
        assert self._staged is not None
        cuda.update(
            self._staged.values[start:stop],
            divisor,
            self._square_avg[start:stop],
            self._acc_delta[start:stop],
            self._weights[start:stop],
            self._next[start:stop],
            hyperparameters,
        )

    def _load(self, state: State) -> None:
        self._weights, self._square_avg, self._acc_delta = (
            torch.from_numpy(vector).to("cuda") for vector in (state.weights, state.square_avg, state.acc_delta)
        )
        self._next = torch.empty_like(self._weights)
        self._pool = Pool(state.weights.size, _pinned)
        self._readers = Allowance(state.weights.nbytes, self._budget)
        torch.cuda.synchronize()

    def _pinned_copy(self) -> Vector:
        host = self._pool.take()
        torch.from_numpy(host).copy_(self._weights)
        return host

    def _publish(self, host: Vector, number: int) -> None:
        before, self.current = self.current, Version(number, host, self._readers, self._pool)
        before.retire()


def device_name() -> str:
    """Returns the current GPU's name.

    Raises:
        RuntimeError: torch sees none.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("device cuda: torch finds no GPU here; use --device cpu, or install a CUDA build of torch")
    return torch.cuda.get_device_name()


def device_memory_bytes() -> int:
    """Returns 80 % of the current GPU's free memory."""
    return torch.cuda.mem_get_info()[0] * 4 // 5


def _pinned(size: int) -> Vector:
    vector: Vector = torch.empty(size, dtype=torch.float32, pin_memory=True).numpy()
    return vector


def _parts(ranges: Sequence[Range], size: int) -> Iterator[tuple[int, int, Hyperparameters | None]]:
    """Cuts the whole vector into parts of one kind: to be updated, or (None) to be kept."""
    at = 0
    for part in (*ranges, None):
        start = size if part is None else part.start
        yield from _cut(at, start, None)
        if part is not None:
            yield from _cut(part.start, part.stop, part.hyperparameters)
            at = part.stop


def _cut(start: int, stop: int, kind: Hyperparameters | None) -> Iterator[tuple[int, int, Hyperparameters | None]]:
    for first in range(start, stop, _PIECE):
        yield first, min(first + _PIECE, stop), kind
