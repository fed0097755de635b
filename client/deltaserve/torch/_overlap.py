"""Gradients that are sent while backward still makes others."""

import logging
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from math import prod
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from deltaserve._background import BackgroundCall
from deltaserve._common.element_types import Array
from deltaserve._transport.overlapped import OverlappedPush
from deltaserve._types import TensorSpec
from deltaserve.torch._tensors import is_plain, own_memory

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from deltaserve.torch._remote import RemoteAdadelta

_log = logging.getLogger("deltaserve")

_PATIENCE = 3
"""How many pushes in a row may be begun in vain before no more are begun."""

_Job = Callable[[], object]


class Overlap:
    """Begins each push at its first gradient, and adds the others as backward makes them.

    Hooks on the parameters hand every gradient to a thread, which copies it, as float32, to memory of its own: from
    there it is sent, and with that what `step()` finds in `.grad` is compared. Nothing else would notice all that may
    have happened to a gradient meanwhile: a change through `.data` or numpy does not count as one for autograd.

    Args:
        remote: Whose gradients; not kept alive by this.
        params: By tensor name, the parameters that its worker knows.

    Attributes:
        push: The one that the next `step()` may take over.
    """

    def __init__(self, remote: "RemoteAdadelta", params: Mapping[str, Tensor]) -> None:
        self._remote = weakref.ref(remote)
        self._params = [params[spec.name] for spec in remote._joined.tensors]
        self._arrays = _arrays(remote._joined.tensors, pinned=any(param.is_cuda for param in self._params))
        self._in_order = list(self._arrays.values())
        self._absent: list[int] | None = None
        self._weight = 1.0
        self._in_vain = 0
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._handles: dict[int, RemovableHandle] = {}
        self._process = os.getpid()
        self._closed = False
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self.push = OverlappedPush(self._arrays)
        self._finalize = weakref.finalize(remote, self.close)
        thread = Thread(target=_work, args=(self._jobs,), name=f"overlap of {remote._joined.name}", daemon=True)
        BackgroundCall(thread.start, None).run()
        self._watch()

    # --- the optimizer's thread

    def end(self, gradients: Mapping[str, Array | None], weight: float) -> OverlappedPush | None:
        """Returns the push that `step()` may take over; no further gradient is added to it.

        Args:
            gradients: What the step is to push.
            weight: With which weight.
        """
        if self._closed or self._process != os.getpid():
            return None
        # What this push is, the next is expected to be.
        self._weight = weight
        self._absent = [index for index, name in enumerate(self._arrays) if gradients[name] is None]
        self._jobs.put(self.push.end)
        return self.push

    def next(self) -> None:
        """Lets go of the present push; gradients from now on are the next one's."""
        if self._closed:
            return
        push = self.push
        self._jobs.put(push.drop)
        # Last: an interrupt before this leaves a push that is over, which the next step makes good.
        self.push = OverlappedPush(self._arrays)
        if push.taken:
            self._in_vain = 0
        elif push.difference:
            self._in_vain += 1
        if self._in_vain == _PATIENCE:
            self._give_up(push.difference or "")
        else:
            self._watch()

    def close(self) -> None:
        """Takes the hooks off and cancels a push that was begun."""
        self._closed = True
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._jobs.put(self.push.drop)
        self._jobs.put(None)
        self._finalize.detach()

    def _give_up(self, difference: str) -> None:
        self.close()
        _log.warning(
            "overlap=True does not help here and is off from now on: %d pushes in a row that had been begun during "
            "backward were thrown away: %s. The results are the same with it and without: leave it out, or leave the "
            "gradients as one backward pass makes them",
            _PATIENCE,
            difference,
        )

    def _watch(self) -> None:
        """Puts hooks on the parameters that have none yet; one that is frozen cannot have one."""
        for index, param in enumerate(self._params):
            if param.requires_grad and index not in self._handles:
                self._handles[index] = param.register_post_accumulate_grad_hook(partial(self._came, index))

    # --- backward's threads

    def _came(self, index: int, param: Tensor) -> None:
        """Hands a gradient over, and goes."""
        gradient = param.grad
        if gradient is None or self._closed or self._process != os.getpid():
            return
        made = None
        if gradient.device.type == "cuda":
            made = torch.cuda.Event()
            made.record(torch.cuda.current_stream(gradient.device))
        self._jobs.put(partial(self._add, self.push, index, gradient, made))

    # --- the thread that adds

    def _add(self, push: OverlappedPush, index: int, gradient: Tensor, made: torch.cuda.Event | None) -> None:
        try:
            if push.over:
                return
            if not push.header and not self._begin(push):
                push.drop()
            elif push.claim(index):
                self._copy(gradient, self._in_order[index], made)
                push.add(index)
        except Exception:
            push.drop()
            raise

    def _begin(self, push: OverlappedPush) -> bool:
        """Begins a push as the one before was, with the present hyperparameters; returns whether it is begun."""
        remote = self._remote()
        if remote is None or self._absent is None or not remote._is_current():
            return False
        return remote._joined._begin(push, self._absent, remote._hyperparameters(), self._weight)

    def _copy(self, gradient: Tensor, out: Array, made: torch.cuda.Event | None) -> None:
        """Copies a gradient, converted, once it is made; waits for nothing that its device does after it."""
        if gradient.shape != out.shape:
            raise ValueError(f"expected a gradient of shape {out.shape}, got {tuple(gradient.shape)}")
        if is_plain(gradient):
            np.copyto(out, own_memory(gradient))
        elif made is None:
            torch.from_numpy(out).copy_(gradient.detach())
        else:
            made.synchronize()
            if gradient.device not in self._streams:
                self._streams[gradient.device] = torch.cuda.Stream(gradient.device)
            with torch.cuda.stream(self._streams[gradient.device]):
                torch.from_numpy(out).copy_(gradient.detach())


def _arrays(tensors: Sequence[TensorSpec], pinned: bool) -> dict[str, Array]:
    """Returns an array for each tensor, all in one piece of memory; pinned memory is what a GPU copies to fastest."""
    stops = list(accumulate(prod(spec.shape) for spec in tensors))
    flat: Array = torch.empty(stops[-1], dtype=torch.float32, pin_memory=pinned).numpy()
    parts = np.split(flat, stops[:-1])
    return {spec.name: part.reshape(spec.shape) for spec, part in zip(tensors, parts, strict=True)}


def _work(jobs: "SimpleQueue[_Job | None]") -> None:
    """Does one job after the other; a failure leaves the gradient to `step()`."""
    while (job := jobs.get()) is not None:
        try:
            job()
        except Exception as error:
            _log.info("a push was not begun, or not continued, during backward: %s", error)
        del job  # and with it a gradient
