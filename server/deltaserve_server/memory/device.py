"""Vectors on a GPU: weights and optimizer state are in its memory, gradients and versions in pinned host memory.

Three CUDA streams overlap the work: one copies gradients up while they arrive, one runs the kernel part by part, and
one copies the new weights of each finished part down.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from deltaserve_server.memory.budget import Budget, ReaderBudget
from deltaserve_server.memory.store import (
    ELEMENT_BYTES,
    Frozen,
    Gradient,
    Range,
    Staging,
    State,
    Store,
    Vector,
    VectorPool,
    Version,
    check_combine,
    root_of_sum,
)
from deltaserve_server.optimizers import cuda
from deltaserve_server.optimizers.formats import Values

_PART = 1 << 22
"""Elements that are updated, and then copied down, at a time: 16 MiB, enough to keep both streams busy."""

_SCRATCH = 1 << 22
"""Elements of all pushes together that are combined at a time: 16 MiB, and about five times that for sorting."""

_TYPES = {np.dtype(np.float32): torch.float32, np.dtype(np.float16): torch.float16, np.dtype(np.uint16): torch.bfloat16}
"""torch's types for the element types of values."""


class DeviceStaging(Staging):
    """A push's values in their own element type, copied to the GPU through pinned memory while they arrive.

    Args:
        size: Number of elements of the flat vector.
        upload: The stream that copies.
    """

    def __init__(self, size: int, upload: torch.cuda.Stream) -> None:
        self._upload = upload
        self._allocate(size, np.dtype(np.float32))
        self.covered: list[tuple[int, int]] = []

    def add(self, offset: int, values: Values) -> None:
        """Copies the piece to pinned memory and queues its copy to the GPU.

        Raises:
            TypeError: Its element type differs from that of the pieces before.
        """
        stop = offset + values.size
        if values.dtype != self._host.dtype:
            if self.covered:
                raise TypeError(f"expected {self._host.dtype} as in the pieces before, got {values.dtype}")
            self._allocate(self._host.size, values.dtype)
        self._host[offset:stop] = values
        with torch.cuda.stream(self._upload):
            self.values[offset:stop].copy_(self._pinned[offset:stop], non_blocking=True)
        self.covered.append((offset, stop))

    def _allocate(self, size: int, dtype: "np.dtype[Any]") -> None:
        kind = _TYPES[dtype]
        self._pinned = torch.empty(size, dtype=kind, pin_memory=True)
        # numpy has no bfloat16, so it sees the bits.
        self._host: Values = (self._pinned.view(torch.uint16) if kind is torch.bfloat16 else self._pinned).numpy()
        with torch.cuda.stream(self._upload):
            self.values = torch.empty(size, dtype=kind, device="cuda")

    def pieces(self) -> list[tuple[int, Values]]:
        """Returns the received values, in host memory."""
        return [(start, self._host[start:stop]) for start, stop in self.covered]

    def used_by(self, stream: torch.cuda.Stream) -> None:
        """Lets `stream` read the values: it waits for the copy, and torch reuses their memory only after its work."""
        stream.wait_stream(self._upload)
        self.values.record_stream(stream)

    def read(self, size: int, stream: torch.cuda.Stream) -> None:
        """Prepares the values as a whole vector for `stream`, the current one: `size` elements, missing ones 0."""
        self.used_by(stream)
        self.lengthen(size)
        edges = [0, *(edge for part in self.covered for edge in part), size]
        for start, stop in list(pairwise(edges))[::2]:
            self.values[start:stop].zero_()

    def lengthen(self, size: int) -> None:
        """Appends zeros up to `size` elements, if the layout was extended after the push arrived."""
        missing = size - self.values.numel()
        if missing:
            zeros = torch.zeros(missing, dtype=self.values.dtype, device="cuda")
            self.values = torch.cat([self.values, zeros])


class DeviceStore(Store):
    """A model's vectors on the current GPU; versions are published in pinned host memory.

    Args:
        state: The initial state, of version `number`.
        budget: Pays for older versions that readers keep.
    """

    def __init__(self, state: State, number: int, budget: Budget) -> None:
        self._budget = budget
        self._upload, self._compute, self._download = (torch.cuda.Stream() for _ in range(3))
        self._single: tuple[DeviceStaging, float] | None = None
        self._sum: torch.Tensor | None = None
        self._is_mean = False
        self._weights: torch.Tensor
        self._next: torch.Tensor
        self._slots: list[torch.Tensor]
        self._pool: VectorPool
        self._readers: ReaderBudget
        self._load(state)
        self.current = Version(number, self._pinned_copy(), self._readers, self._pool)

    def stage(self) -> DeviceStaging:
        """Returns an empty staging for a push."""
        return DeviceStaging(self._weights.numel(), self._upload)

    def staging_bytes(self, received_bytes: int) -> int:
        """Returns the size of a whole vector twice, pinned and on the GPU, for a push of any size."""
        return 2 * self._weights.numel() * ELEMENT_BYTES

    def fold(self, staging: Staging, factor: float) -> None:
        """Adds a push to the sum. A single push stays in its staging."""
        assert isinstance(staging, DeviceStaging)
        assert not self._is_mean
        size = self._weights.numel()
        with torch.cuda.stream(self._compute):
            if self._single is None and self._sum is None:
                staging.used_by(self._compute)
                staging.lengthen(size)
                self._single = staging, factor
                return
            if self._single is not None:
                first, first_factor = self._single
                first.read(size, self._compute)
                # Adding 0 turns -0 into +0, as on the host, whose sum starts at 0.
                self._sum = first.values.float().mul_(first_factor).add_(0.0)
                self._single = None
            assert self._sum is not None
            staging.used_by(self._compute)
            for start, stop in staging.covered:
                # add_ with alpha would round the product and the sum once together; the host rounds each.
                self._sum[start:stop].add_(staging.values[start:stop].float().mul_(factor))
        self._compute.synchronize()

    def combine(self, stagings: Sequence[tuple[Staging, float]], trim: int) -> None:
        """Sets the gradient to the trimmed mean of pushes, block by block."""
        count, size = len(stagings), self._weights.numel()
        check_combine(count, trim, self._single is not None or self._sum is not None)
        block = max(1, _SCRATCH // count)
        with torch.cuda.stream(self._compute):
            vectors = []
            for staging, factor in stagings:
                assert isinstance(staging, DeviceStaging)
                staging.read(size, self._compute)
                vectors.append((staging.values, factor))
            mean = torch.empty(size, dtype=torch.float32, device="cuda")
            for start in range(0, size, block):
                part = slice(start, start + block)
                rows = torch.empty((count, mean[part].numel()), dtype=torch.float32, device="cuda")
                for row, (values, factor) in zip(rows, vectors, strict=True):
                    row.copy_(values[part]).mul_(factor)
                mean[part] = _trimmed_mean(rows, trim)
            self._sum, self._is_mean = mean, True
        self._compute.synchronize()

    def update(self, ranges: Sequence[Range], weight: float, number: int) -> float:
        """Applies the gradient part by part, copies each part to the host, and publishes the new version."""
        gradient, divisor = self._gradient(weight)
        host = self._pool.take()
        squares = []
        for place, part in _parts(ranges, self._weights.numel()):
            with torch.cuda.stream(self._compute):
                if part is None:
                    self._next[place].copy_(self._weights[place])
                else:
                    squares.append(self._update(place, part, gradient, divisor))
            # This part goes down while the kernel runs on the next one.
            self._download.wait_stream(self._compute)
            with torch.cuda.stream(self._download):
                torch.from_numpy(host[place]).copy_(self._next[place], non_blocking=True)
        with torch.cuda.stream(self._compute):
            change = torch.stack(squares).tolist() if squares else []
        # Only complete weights may be published.
        self._download.synchronize()
        # Readers use the copy in host memory, so the old weights on the GPU are free for the next update.
        self._weights, self._next = self._next, self._weights
        self._single, self._sum, self._is_mean = None, None, False
        self._publish(host, number)
        return root_of_sum(change)

    def gradient(self, weight: float) -> Gradient:
        """Returns the received values in pinned memory, or a copy of the sum."""
        values, divisor = self._gradient(weight)
        if self._single is not None:
            return Gradient(self._single[0].pieces(), divisor, lambda: None)
        with torch.cuda.stream(self._compute):
            total: Vector = values.cpu().numpy()
        return Gradient([(0, total)], divisor, lambda: None)

    def freeze(self) -> Frozen:
        """Returns the version's own weights, and copies of the slots on the GPU."""
        # Copies, because updates change the slots in place.
        with torch.cuda.stream(self._compute):
            slots = tuple(slot.clone() for slot in self._slots)
        self._compute.synchronize()
        self.current.acquire()
        return _DeviceFrozen(self.current, slots)

    def use_shared_memory(self) -> None:
        """Does nothing: other processes cannot map pinned memory."""

    def state(self) -> State:
        """Returns a copy of the vectors."""
        return State(self._weights.cpu().numpy(), tuple(slot.cpu().numpy() for slot in self._slots))

    def put(self, state: State, number: int) -> None:
        """Replaces the vectors."""
        self._load(state)
        self._publish(self._pinned_copy(), number)

    def extend(self, state: State) -> None:
        """Appends elements."""
        before = self.state()
        pairs = zip(before.slots, state.slots, strict=True)
        slots = tuple(np.concatenate(pair) for pair in pairs)
        self._load(State(np.concatenate([before.weights, state.weights]), slots))
        with torch.cuda.stream(self._compute):
            if self._single is not None:
                self._single[0].lengthen(self._weights.numel())
            if self._sum is not None:
                self._sum = torch.cat([self._sum, torch.zeros(state.weights.size, device="cuda")])
        self._compute.synchronize()
        self._publish(self._pinned_copy(), self.current.number)

    def _gradient(self, weight: float) -> tuple[torch.Tensor, float]:
        """Returns the next update's gradient, and its divisor."""
        if self._single is not None:
            staging, factor = self._single
            return staging.values, weight / factor
        assert self._sum is not None
        return self._sum, 1.0 if self._is_mean else weight

    def _update(self, place: slice, part: Range, gradient: torch.Tensor, divisor: float) -> torch.Tensor:
        """Queues the update of the elements `place`; returns the sum of the squares of its change, float64."""
        squares = torch.empty(cuda.blocks(place.stop - place.start), dtype=torch.float64, device="cuda")
        cuda.update(
            gradient[place],
            divisor,
            [slot[place] for slot in self._slots],
            self._weights[place],
            self._next[place],
            squares,
            part.optimizer,
            part.count,
        )
        return squares.sum()

    def _load(self, state: State) -> None:
        self._weights, *self._slots = (torch.from_numpy(vector).to("cuda") for vector in state.vectors)
        self._next = torch.empty_like(self._weights)
        self._pool = VectorPool(state.weights.size, _pinned)
        self._readers = ReaderBudget(state.weights.nbytes, self._budget)
        torch.cuda.synchronize()

    def _pinned_copy(self) -> Vector:
        host = self._pool.take()
        torch.from_numpy(host).copy_(self._weights)
        return host

    def _publish(self, host: Vector, number: int) -> None:
        before, self.current = self.current, Version(number, host, self._readers, self._pool)
        before.retire()


class _DeviceFrozen(Frozen):
    """A view of an acquired version's weights on the host and of copies of the slots on the GPU."""

    def __init__(self, version: Version, slots: Sequence[torch.Tensor]) -> None:
        self._version = version
        self._slots = slots

    def state(self) -> State:
        """Copies the slots to the host."""
        return State(self._version.weights, tuple(slot.cpu().numpy() for slot in self._slots))

    def release(self) -> None:
        """Ends the view."""
        self._version.release()


def device_name() -> str:
    """Returns the current GPU's name.

    Raises:
        RuntimeError: torch finds no GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("device cuda: torch finds no GPU; use --device cpu, or install a CUDA build of torch")
    return torch.cuda.get_device_name()


def device_memory_bytes() -> int:
    """Returns 80 % of the current GPU's free memory."""
    return torch.cuda.mem_get_info()[0] * 4 // 5


def _pinned(size: int) -> Vector:
    vector: Vector = torch.empty(size, dtype=torch.float32, pin_memory=True).numpy()
    return vector


def _trimmed_mean(rows: torch.Tensor, trim: int) -> torch.Tensor:
    """Computes `robust.trimmed_mean` operation for operation, from float32 [n, m] to float64 [m]."""
    kept = torch.sort(rows, dim=0).values[trim : len(rows) - trim]
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for row in kept:
        total += row
    # The divisor is a tensor because torch multiplies by the reciprocal of a plain number, which rounds twice.
    return total / torch.full((), len(kept), dtype=torch.float64, device=rows.device)


def _parts(ranges: Sequence[Range], size: int) -> Iterator[tuple[slice, Range | None]]:
    """Splits the whole vector into parts, with the range that each lies in, or None where nothing is updated."""
    at = 0
    for part in ranges:
        yield from _split(at, part.start, None)
        yield from _split(part.start, part.stop, part)
        at = part.stop
    yield from _split(at, size, None)


def _split(start: int, stop: int, part: Range | None) -> Iterator[tuple[slice, Range | None]]:
    for first in range(start, stop, _PART):
        yield slice(first, min(first + _PART, stop)), part
