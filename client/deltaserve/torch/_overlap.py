"""Pushes that begin during backward: each gradient is sent while backward still computes others."""

import logging
import os
import weakref
from _thread import start_new_thread  # Thread.start waits in Python code, where Ctrl+C could leave it half done
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from math import prod
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from deltaserve._common.element_types import Array
from deltaserve._transport.overlapped import OverlappedPush
from deltaserve._types import TensorSpec
from deltaserve.torch._tensors import can_view, view

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

_log = logging.getLogger("deltaserve")

_MAX_DISCARDED = 3
"""How many pushes in a row may be discarded before overlap switches itself off."""

BeginPush = Callable[[OverlappedPush, list[int], float], bool]
"""Begins a push; given the indices of the tensors without gradient and the push's weight, returns whether it began."""

_Job = Callable[[], object]


class Overlap:
    """Begins each push at its first gradient and adds the others as backward computes them.

    A hook on every parameter hands its gradient to a background thread, which copies it, as float32, into a buffer. The
    buffer is what is sent. `step()` compares it bit for bit with what it finds in `.grad`, since nothing else reveals
    every change in between: autograd does not count a write through `.data` or numpy.

    Args:
        owner: The optimizer. It is not kept alive; when it is garbage collected, the overlap closes.
        begin: A weak reference to the owner's method that begins a push.
        tensors: The layout of the model.
        params: The parameters by tensor name.

    Attributes:
        push: The push that the next `step()` may take over.
    """

    def __init__(
        self,
        owner: object,
        begin: Callable[[], BeginPush | None],
        tensors: Sequence[TensorSpec],
        params: Mapping[str, Tensor],
    ) -> None:
        self._begin = begin
        self._params = [params[spec.name] for spec in tensors]
        self._buffers = _buffers(tensors, pinned=any(param.is_cuda for param in self._params))
        self._buffer_list = list(self._buffers.values())
        self._absent: list[int] | None = None  # unknown before the first step
        self._weight = 1.0
        self._discarded = 0
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._hooks: dict[int, RemovableHandle] = {}
        self._process = os.getpid()
        self._closed = False
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self.push = OverlappedPush(self._buffers)
        self._finalizer = weakref.finalize(owner, self.close)
        start_new_thread(_work, (self._jobs,))
        self._add_hooks()

    # --- called by the thread that calls step()

    def end(self, gradients: Mapping[str, Array | None], weight: float) -> OverlappedPush | None:
        """Ends the present push: no further gradient is added to it.

        Args:
            gradients: The gradients that the step pushes.
            weight: The weight of the step's push.

        Returns:
            The push, for the worker to take over; None if overlap is off.
        """
        if self._closed or self._process != os.getpid():
            return None
        # The next push is begun before its step, so it is expected to be like this one.
        self._weight = weight
        self._absent = [index for index, name in enumerate(self._buffers) if gradients[name] is None]
        self._jobs.put(self.push.end)
        return self.push

    def next(self) -> None:
        """Drops the present push, whatever its state; gradients from now on belong to the next one."""
        if self._closed:
            return
        push = self.push
        self._jobs.put(push.drop)
        # After an interrupt before this line the push is cancelled, and the next step sends its gradients itself.
        self.push = OverlappedPush(self._buffers)
        if push.taken:
            self._discarded = 0
        elif push.difference:
            self._discarded += 1
        if self._discarded == _MAX_DISCARDED:
            self.close()
            _log.warning(
                "overlap=True is off from now on: the last %d pushes that began during backward were discarded: %s. "
                "Results are the same without it: remove overlap=True, or leave gradients as one backward pass made "
                "them",
                _MAX_DISCARDED,
                push.difference,
            )
        else:
            self._add_hooks()

    def close(self) -> None:
        """Removes the hooks, cancels a push that has begun, and ends the thread."""
        self._closed = True
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        self._jobs.put(self.push.drop)
        self._jobs.put(None)
        self._finalizer.detach()

    def _add_hooks(self) -> None:
        """Adds a hook to each parameter that lacks one; a frozen parameter cannot have one until it is unfrozen."""
        for index, param in enumerate(self._params):
            if param.requires_grad and index not in self._hooks:
                self._hooks[index] = param.register_post_accumulate_grad_hook(partial(self._on_gradient, index))

    # --- called by autograd's threads

    def _on_gradient(self, index: int, param: Tensor) -> None:
        """Queues a gradient for the background thread."""
        gradient = param.grad
        if gradient is None or self._closed or self._process != os.getpid():  # a forked child has no such thread
            return
        computed = None
        if gradient.device.type == "cuda":
            computed = torch.cuda.Event()
            computed.record(torch.cuda.current_stream(gradient.device))
        self._jobs.put(partial(self._add, self.push, index, gradient, computed))

    # --- called by the background thread

    def _add(self, push: OverlappedPush, index: int, gradient: Tensor, computed: torch.cuda.Event | None) -> None:
        """Adds a gradient to a push, which begins with its first one."""
        try:
            if push.over:
                return
            if not push.header and not self._try_begin(push):
                push.drop()
            elif push.claim(index):
                self._copy(gradient, self._buffer_list[index], computed)
                push.add(index)
        except Exception:
            push.drop()
            raise

    def _try_begin(self, push: OverlappedPush) -> bool:
        begin = self._begin()
        return begin is not None and self._absent is not None and begin(push, self._absent, self._weight)

    def _copy(self, gradient: Tensor, out: Array, computed: torch.cuda.Event | None) -> None:
        """Copies a gradient to `out`; from a GPU as soon as `computed` is reached, whatever the GPU does after it."""
        if gradient.shape != out.shape:
            raise ValueError(f"expected a gradient of shape {out.shape}, got {tuple(gradient.shape)}")
        if can_view(gradient):
            np.copyto(out, view(gradient))
        elif computed is None:
            torch.from_numpy(out).copy_(gradient.detach())
        else:
            computed.synchronize()
            if gradient.device not in self._streams:
                self._streams[gradient.device] = torch.cuda.Stream(gradient.device)
            with torch.cuda.stream(self._streams[gradient.device]):
                torch.from_numpy(out).copy_(gradient.detach())


def _buffers(tensors: Sequence[TensorSpec], pinned: bool) -> dict[str, Array]:
    """Returns an array for each tensor, all in one allocation; GPUs copy fastest to pinned memory."""
    stops = list(accumulate(prod(spec.shape) for spec in tensors))
    flat: Array = torch.empty(stops[-1], dtype=torch.float32, pin_memory=pinned).numpy()
    parts = np.split(flat, stops[:-1])
    return {spec.name: part.reshape(spec.shape) for spec, part in zip(tensors, parts, strict=True)}


def _work(jobs: "SimpleQueue[_Job | None]") -> None:
    """Runs jobs until it gets None. After a failed job `step()` sends the gradients itself."""
    while (job := jobs.get()) is not None:
        try:
            job()
        except Exception as error:
            _log.info("overlap: a push did not begin or continue during backward: %s", error)
        del job  # a job holds a gradient, and the next may be long in coming
