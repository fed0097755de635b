"""The drop-in."""

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, NoReturn, Self, overload

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from deltaserve._client import connect
from deltaserve._common.element_types import Array, WireType, named
from deltaserve._errors import ConflictError, StaleGradientError
from deltaserve._model import Model
from deltaserve._transport.protocol import TransportName, check_transport
from deltaserve._types import Hyperparameters, Policy, StepResult
from deltaserve._worker import Worker
from deltaserve.torch._element_types import TORCH_ELEMENT_TYPES
from deltaserve.torch._local import LocalOptimizer, LocalSteps
from deltaserve.torch._overlap import Overlap
from deltaserve.torch._states import from_torch, give_names, to_torch
from deltaserve.torch._tensors import gradient_of, is_plain, own_memory, to_host

_log = logging.getLogger("deltaserve")

_HYPERPARAMETERS = ("lr", "rho", "eps", "weight_decay", "maximize")

_UNUSED = {"foreach": None, "capturable": False, "differentiable": False}
"""What torch.optim.Adadelta has in its groups besides: kept so that state dicts fit both."""


class RemoteAdadelta(torch.optim.Optimizer):
    """Adadelta on a server; in the training loop as `torch.optim.Adadelta`.

    The first worker creates the model with its own weights; those that come later start from the server's. `step()`
    pushes the gradients with this group's present hyperparameters and writes the new weights into the parameters. The
    server holds weights and state in float32, whatever the parameters are.

    The server's weights are the model's: change parameters in another way (`load_state_dict` of the module, say) before
    making the optimizer, or call `load_state_dict` of the optimizer afterwards, which puts both on the server.

    A gradient of weights that are too old, because a synchronous round closed without it or it is beyond
    `max_staleness`, is left out: a warning is logged, `last_result` is None, and the parameters have the newer weights.

    With `local_steps`, each worker trains by itself for so many steps, with an optimizer of its own that
    `local_optimizer` makes; then the difference of the weights is pushed as one gradient, and Adadelta is the outer
    optimizer (Reddi et al., 2020, arXiv:2003.00295; DiLoCo: Douillard et al., 2023, arXiv:2311.08105). The local
    optimizer keeps its state from one push to the next.

    Args:
        params: Parameters, parameter groups, or named parameters, whose names then name the tensors on the server.
        target: HOST:PORT of the server, or unix:PATH.
        model: The model's name on the server.
        lr: As in torch.optim.Adadelta, like the next four; each group may have its own.
        rho: Likewise.
        eps: Likewise.
        weight_decay: Likewise.
        maximize: Likewise.
        policy: When a push becomes an update; None means `deltaserve.Async()`.
        worker: This worker's name; None makes one up.
        local_steps: How many steps of the local optimizer make one push.
        local_optimizer: Makes it, for instance `functools.partial(torch.optim.SGD, lr=0.1)`; None means that gradients
            are pushed as they are.
        overlap: Send each gradient as soon as backward has made it, so that `step()` finds most of them sent. The
            results are the same, bit for bit: what is no longer there in `step()` as it was sent is thrown away, and
            the gradients are pushed anew. It is for gradients that reach `step()` as one backward pass made them: where
            they are clipped, unscaled or accumulated, it stops with a warning after a few steps. It shortens training
            where backward leaves a processor core idle, as on a GPU; takes memory for one more copy of the gradients,
            and a thread of the server while backward lasts; and does nothing for a model that travels in one message,
            or through shared memory.
        transport: "auto" has vectors go through shared memory where the server is on this host, runs as the same user
            and allows it; "stream" never; "shared" insists on it when the session is opened.
        wire: The type in which elements travel in messages, "float32", "bfloat16" or "float16", in both directions.
        timeout_seconds: How long any call may take in all, its retries and the wait for a round included.

    Raises:
        ValueError: A hyperparameter is out of range, `local_steps` is without a local optimizer, `overlap` is with one,
            or there is no such transport or type.
        TypeError: A parameter is no real floating-point tensor.
        ConflictError: The model exists and differs; the message says in what.
        UnavailableError: The server was not reached.

    Example:
        >>> import deltaserve_server
        >>> net = torch.nn.Linear(2, 1)
        >>> with deltaserve_server.LocalServer() as server:
        ...     optimizer = RemoteAdadelta(net.parameters(), server.target, model="line")
        ...     net(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        ...     optimizer.close()
    """

    def __init__(
        self,
        params: Any,
        target: str,
        *,
        model: str,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        maximize: bool = False,
        policy: Policy | None = None,
        worker: str | None = None,
        local_steps: int = 1,
        local_optimizer: LocalOptimizer | None = None,
        overlap: bool = False,
        transport: TransportName = "auto",
        wire: WireType = "float32",
        timeout_seconds: float = 120.0,
    ) -> None:
        if local_steps < 1 or (local_steps > 1 and local_optimizer is None):
            raise ValueError(f"local_steps: expected 1, or more with a local_optimizer, got {local_steps}")
        if overlap and local_optimizer:
            raise ValueError("overlap: a local_optimizer's steps make what is pushed, backward does not")
        check_transport(transport)
        elements = named(wire, TORCH_ELEMENT_TYPES)
        self._make_local = local_optimizer
        self._local: LocalSteps | None = None
        self._overlaps = overlap
        self._overlap: Overlap | None = None
        self._worker: Worker | None = None
        self._version: int | None = None
        self._staged: dict[Tensor, Array] = {}
        self._names: dict[Tensor, str] = {}
        defaults = {"lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, {**defaults, **_UNUSED})
        self._client = connect(target, timeout_seconds=timeout_seconds)
        try:
            self._model = self._create(model, policy)
            self._open_worker = partial(self._model._worker, lease_seconds=None, transport=transport, wire=elements)
            self._name = worker
            if local_optimizer:
                self._local = LocalSteps(self, local_optimizer, local_steps)
            self._join()
        except BaseException:
            self._client.close()
            raise

    @property
    def rank(self) -> int:
        """The lowest number that no other live worker of the model had when this one came."""
        return self._joined.rank

    @property
    def version(self) -> int:
        """The version of the weights that the parameters have, before any local steps."""
        return self._joined.version

    @property
    def last_result(self) -> StepResult | None:
        """What became of the last push; None before the first, and where it was left out or refused."""
        return self._joined.last_result

    @property
    def local_optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer of the local steps, for schedulers and checkpoints; None where there is none."""
        return self._local.optimizer if self._local else None

    @overload
    def step(self, closure: None = None, *, weight: float = 1.0) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, weight: float = 1.0) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, weight: float = 1.0) -> float | None:
        """Pushes the gradients and writes the new weights into the parameters; or makes a local step.

        Args:
            closure: Evaluates the model again and returns the loss.
            weight: How much the gradient counts in the mean of its round, for instance its number of samples. Those of
                local steps add up.

        Raises:
            Error: As `deltaserve.Worker.step` raises it. Where the connection broke while weights came, the parameters
                are of two versions; the next step leaves its gradient out and puts them right.
        """
        try:
            return self._step(closure, weight)
        finally:
            if self._overlap:
                self._overlap.next()

    @torch.no_grad()
    def flush(self) -> None:
        """Pushes what the local steps since the last push have made, if anything, as the end of training asks for.

        Raises:
            Error: As from `step`.
        """
        if not self._is_current():
            self._catch_up()
        elif self._local:
            self._local.push()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, on the server too; its weights are this worker's, unless another added it before."""
        if self._worker:
            self.flush()
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        try:
            _check(self.param_groups[index])
            if self._make_local and self.param_groups[index]["maximize"]:
                raise ValueError("maximize belongs to the local optimizer, which takes the steps")
            give_names(self._names, index, self.param_groups[index])  # for good: load_state_dict replaces "param_names"
            if self._worker:
                self._extend(index)
        except BaseException:
            for param in self.param_groups.pop()["params"]:
                self._names.pop(param, None)
            raise
        if self._worker:
            if self._local:
                self._local.optimizer.add_param_group({"params": param_group["params"]})
            older = self._worker
            self._join()  # takes the older session's place in a round
            older.close()

    def state_dict(self) -> dict[str, Any]:
        """Returns what `torch.optim.Adadelta.state_dict()` would, with the state that the server has."""
        self.state.update(to_torch(self._model.pull_state(), self._named()))
        try:
            return super().state_dict()
        finally:
            self._drop_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts a state of `torch.optim.Adadelta` or of this class on the server, with the parameters' present values.

        It counts for every worker of the model: call it in one before the others start, or under
        `Sync(min_workers=N)` in all N before their first step.
        """
        super().load_state_dict(state_dict)
        try:
            self._model.put_state(from_torch(self.state, self._named()))
        finally:
            self._drop_state()
        self._pull()

    def close(self) -> None:
        """Ends this worker's session and the connection; otherwise that happens when the process exits."""
        if self._overlap:
            self._overlap.close()
        if self._worker:
            self._worker.close()
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in {**self.defaults, **_UNUSED}.items():
                group.setdefault(key, value)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a RemoteAdadelta is a connection and cannot be copied or pickled: take its state_dict()")

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__reduce__()

    # --- the session

    @property
    def _joined(self) -> Worker:
        assert self._worker is not None
        return self._worker

    def _create(self, name: str, policy: Policy | None) -> Model:
        """Creates the model or joins it.

        Its tensors are in the reverse order of the parameters: about the order in which backward makes gradients, and
        in which they can therefore be sent. Where others have made it in another order, theirs counts.
        """
        tensors = {name: to_host(param) for name, param in reversed(list(self._named()))}
        create = partial(
            self._client.create_model,
            name,
            groups=self._hyperparameters(),
            group_of=self._group_of(),
            policy=policy,
        )
        try:
            return create(tensors)
        except ConflictError:
            theirs = [spec.name for spec in self._client.model(name).tensors if spec.name in tensors]
            in_their_order = {key: tensors[key] for key in dict.fromkeys([*theirs, *tensors])}
            if list(in_their_order) == list(tensors):
                raise
        return create(in_their_order)

    def _join(self) -> None:
        self._worker = self._open_worker(self._name)
        self._name = self._worker.name
        self._pull()
        if self._overlap:
            self._overlap.close()
        if self._overlaps:
            self._overlap = Overlap(self, dict(self._named()))

    @torch.no_grad()
    def _pull(self) -> None:
        out = self._out()
        self._joined.pull(out=out)
        self._written(out)

    def _is_current(self) -> bool:
        """Whether the parameters have the weights that the worker has; an interrupt may have come between."""
        return self._version == self._joined.version

    def _catch_up(self) -> None:
        _log.warning("worker %s: a gradient is left out: it is of weights that had arrived in part", self._joined.name)
        self._pull()

    def _step(self, closure: Callable[[], float] | None, weight: float) -> float | None:
        if not self._is_current():
            self._catch_up()
            return None if closure is None else _evaluate(closure)
        if self._local:
            return self._local.step(closure, weight)
        loss = None if closure is None else _evaluate(closure)
        self._exchange({name: gradient_of(param) for name, param in self._named()}, weight)
        return loss

    def _exchange(self, gradients: dict[str, Array | None], weight: float) -> None:
        """Pushes gradients and takes the weights."""
        worker, out = self._joined, self._out()
        if self._overlap:
            worker._take_over(self._overlap.end(gradients, weight))
        try:
            worker.step(gradients, hyperparameters=self._hyperparameters(), weight=weight, out=out)
        except StaleGradientError as error:
            base = error.metadata.get("base")
            why = f"of version {base}, which is too old: version {worker.version} is here now" if base else error
            _log.warning("worker %s: a gradient is left out: %s", worker.name, why)
        except BaseException:
            if not self._is_current():  # weights came all the same, to mend what had come in part
                self._written(out)
            raise
        self._written(out)

    # --- parameters as named arrays

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for index in range(len(self.param_groups)):
            yield from self._named_in(index)

    def _named_in(self, index: int) -> Iterator[tuple[str, Tensor]]:
        for param in self.param_groups[index]["params"]:
            yield self._names[param], param

    def _extend(self, index: int) -> None:
        """Adds a group to the model on the server."""
        tensors = {name: to_host(param) for name, param in reversed(list(self._named_in(index)))}
        hyperparameters = self._hyperparameters()[index:]
        self._model.extend(tensors, groups=hyperparameters, group_of=dict.fromkeys(tensors, index))

    def _group_of(self) -> dict[str, int]:
        return {name: index for index in range(len(self.param_groups)) for name, _ in self._named_in(index)}

    def _hyperparameters(self) -> list[Hyperparameters]:
        return [
            Hyperparameters(**{key: kind(group[key]) for key, kind in zip(_HYPERPARAMETERS, _KINDS, strict=True)})
            for group in self.param_groups
        ]

    def _out(self) -> dict[str, Array]:
        """Returns where the weights are to be written: a parameter's own memory if it is float32, contiguous, here."""
        return {name: own_memory(param) if is_plain(param) else self._stage(param) for name, param in self._named()}

    def _stage(self, param: Tensor) -> Array:
        if param not in self._staged:
            self._staged[param] = np.empty(tuple(param.shape), np.float32)
        return self._staged[param]

    def _written(self, out: dict[str, Array]) -> None:
        """Copies what was staged into its parameter, and tells autograd of what was written past it."""
        for name, param in self._named():
            if is_plain(param):
                increment_version(param)
            else:
                param.copy_(torch.from_numpy(out[name]))
        if self._local:
            self._local.begin()
        self._version = self._joined.version  # last: until then the parameters may be of two versions

    def _drop_state(self) -> None:
        """Forgets the parameters' state, which the server has; what hooks put beside it stays."""
        for _, param in self._named():
            self.state.pop(param, None)


def _evaluate(closure: Callable[[], float]) -> float:
    with torch.enable_grad():
        return closure()


_KINDS: tuple[Callable[[Any], Any], ...] = (float, float, float, float, bool)


def _check(group: dict[str, Any]) -> None:
    """Raises ValueError, worded as by torch.optim.Adadelta, and TypeError for complex parameters."""
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    allowed: Iterable[tuple[str, str, bool]] = (
        ("lr", "learning rate", group["lr"] >= 0),
        ("rho", "rho value", 0 <= group["rho"] <= 1),
        ("eps", "epsilon value", group["eps"] > 0),
        ("weight_decay", "weight_decay value", group["weight_decay"] >= 0),
    )
    for key, name, fits in allowed:
        if not fits:
            raise ValueError(f"Invalid {name}: {group[key]}")
    for param in group["params"]:
        if not param.dtype.is_floating_point:
            raise TypeError(f"RemoteAdadelta takes real floating-point parameters, not {param.dtype}")
