"""`RemoteAdadelta`: a `torch.optim.Optimizer` whose state and update live on a deltaserve server."""

from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, NoReturn, Self, overload

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from deltaserve._client import connect
from deltaserve._types import Array, Hyperparameters, ModelState, Policy, StepResult
from deltaserve._worker import Worker

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

    Args:
        params: Parameters, parameter groups, or named parameters, whose names then name the tensors on the server.
        target: HOST:PORT of the server.
        model: The model's name on the server.
        lr: As in torch.optim.Adadelta, like the next four; each group may have its own.
        rho: Likewise.
        eps: Likewise.
        weight_decay: Likewise.
        maximize: Likewise.
        policy: When a push becomes an update; None means `deltaserve.Async()`.
        worker: This worker's name; None makes one up.
        timeout_seconds: How long any call may take in all, its retries and the wait for a round included.

    Raises:
        ValueError: A hyperparameter is out of range.
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
        timeout_seconds: float = 120.0,
    ) -> None:
        self._worker: Worker | None = None
        self._staged: dict[Tensor, Array] = {}
        self._names: dict[Tensor, str] = {}
        defaults = {"lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, {**defaults, **_UNUSED})
        self._client = connect(target, timeout_seconds=timeout_seconds)
        try:
            self._model = self._client.create_model(
                model,
                {name: _to_host(param) for name, param in self._named()},
                groups=self._hyperparameters(),
                group_of=self._group_of(),
                policy=policy,
            )
            self._name = worker
            self._join()
        except BaseException:
            self._client.close()
            raise

    @property
    def rank(self) -> int:
        """The lowest number that no other live worker of the model had when this one came."""
        return self._joined.rank

    @property
    def last_result(self) -> StepResult | None:
        """What became of the last push; None before the first."""
        return self._joined.last_result

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Pushes the gradients and writes the new weights into the parameters.

        Args:
            closure: Evaluates the model again and returns the loss.

        Raises:
            Error: As `deltaserve.Worker.step` raises it. Where the connection broke while weights came, the parameters
                are of two versions; the next step puts them right, and raises ConflictError instead of pushing.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = {name: None if param.grad is None else _gradient(param.grad) for name, param in self._named()}
        out = self._out()
        self._joined.step(gradients, hyperparameters=self._hyperparameters(), out=out)
        self._written(out)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, on the server too; its weights are this worker's, unless another added it before."""
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        try:
            _check(self.param_groups[index])
            self._give_names(index)
            if self._worker:
                self._extend(index)
        except BaseException:
            for param in self.param_groups.pop()["params"]:
                self._names.pop(param, None)
            raise
        if self._worker:
            older = self._worker
            self._join()  # takes the older session's place in a round
            older.close()

    def state_dict(self) -> dict[str, Any]:
        """Returns what `torch.optim.Adadelta.state_dict()` would, with the state that the server has."""
        self._fill_state(self._model.pull_state())
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
            self._model.put_state(self._present_state())
        finally:
            self._drop_state()
        self._pull()

    def close(self) -> None:
        """Ends this worker's session and the connection; otherwise that happens when the process exits."""
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

    def _join(self) -> None:
        self._worker = self._model.worker(self._name)
        self._name = self._worker.name
        self._pull()

    @torch.no_grad()
    def _pull(self) -> None:
        out = self._out()
        self._joined.pull(out=out)
        self._written(out)

    # --- parameters as named arrays

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for index in range(len(self.param_groups)):
            yield from self._named_in(index)

    def _named_in(self, index: int) -> Iterator[tuple[str, Tensor]]:
        for param in self.param_groups[index]["params"]:
            yield self._names[param], param

    def _give_names(self, index: int) -> None:
        """Names a group's tensors on the server, for good: `load_state_dict` replaces "param_names" in the group.

        Those without a name are named by group and place.

        Raises:
            ValueError: Two tensors have the same name.
        """
        group = self.param_groups[index]
        names = group.get("param_names") or [f"{index}.{place}" for place in range(len(group["params"]))]
        named = dict(zip(group["params"], names, strict=True))
        taken = {name for param, name in self._names.items() if param not in named}
        for name in named.values():
            if name in taken:
                raise ValueError(f"two parameters are named {name}")
            taken.add(name)
        self._names.update(named)

    def _extend(self, index: int) -> None:
        """Adds a group to the model on the server."""
        tensors = {name: _to_host(param) for name, param in self._named_in(index)}
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
        return {name: _own_memory(param) if _is_plain(param) else self._stage(param) for name, param in self._named()}

    def _stage(self, param: Tensor) -> Array:
        if param not in self._staged:
            self._staged[param] = np.empty(tuple(param.shape), np.float32)
        return self._staged[param]

    def _written(self, out: dict[str, Array]) -> None:
        """Copies what was staged into its parameter, and tells autograd of what was written past it."""
        for name, param in self._named():
            if _is_plain(param):
                increment_version(param)
            else:
                param.copy_(torch.from_numpy(out[name]))

    # --- state dicts

    def _fill_state(self, pulled: ModelState) -> None:
        """Gives every parameter that has had an update the state that torch.optim.Adadelta would hold."""
        assert pulled.square_avg is not None
        assert pulled.acc_delta is not None
        for name, param in self._named():
            count = pulled.update_counts[name]
            if count:
                self.state[param] = {
                    "step": torch.tensor(float(count)),
                    "square_avg": torch.from_numpy(pulled.square_avg[name]).to(param),
                    "acc_delta": torch.from_numpy(pulled.acc_delta[name]).to(param),
                }

    def _drop_state(self) -> None:
        """Forgets the parameters' state, which the server has; what hooks put beside it stays."""
        for _, param in self._named():
            self.state.pop(param, None)

    def _present_state(self) -> ModelState:
        """Returns the parameters and what `self.state` holds; zero state where it holds nothing."""
        held = {name: (param, self.state.get(param, {})) for name, param in self._named()}
        vectors = {
            key: {name: _to_host(state.get(key, torch.zeros_like(param))) for name, (param, state) in held.items()}
            for key in ("square_avg", "acc_delta")
        }
        return ModelState(
            version=0,
            weights={name: _to_host(param) for name, (param, _) in held.items()},
            square_avg=vectors["square_avg"],
            acc_delta=vectors["acc_delta"],
            update_counts={name: int(state.get("step", 0)) for name, (_, state) in held.items()},
        )


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


def _is_plain(param: Tensor) -> bool:
    return param.device.type == "cpu" and param.dtype is torch.float32 and param.is_contiguous()


def _own_memory(param: Tensor) -> Array:
    array: Array = param.detach().numpy()
    return array


def _to_host(tensor: Tensor) -> Array:
    """Returns a tensor as a contiguous float32 array, its own memory where it is one already."""
    array: Array = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return array


def _gradient(gradient: Tensor) -> Array:
    if gradient.is_sparse:
        raise RuntimeError("Adadelta does not support sparse gradients")
    return _to_host(gradient)
