"""What the drop-ins for torch optimizers have in common."""

import logging
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, ClassVar, NoReturn, Self, Unpack, overload

import torch
from torch import Tensor

from deltaserve._client import connect
from deltaserve._common.element_types import Array, WireType, named
from deltaserve._common.optimizers import Optimizer
from deltaserve._common.policies import Policy
from deltaserve._credentials import Credentials
from deltaserve._errors import ConflictError, Error, RequestError, StaleGradientError
from deltaserve._model import Model
from deltaserve._transport.overlapped import OverlappedPush
from deltaserve._transport.protocol import TransportName, check_transport
from deltaserve._types import StepResult
from deltaserve._worker import Worker
from deltaserve.torch._element_types import TORCH_ELEMENT_TYPES
from deltaserve.torch._groups import (
    arguments_of,
    check_group,
    check_structure,
    complete_groups,
    optimizers_of,
    torch_class_of,
    torch_defaults,
)
from deltaserve.torch._local_steps import LocalOptimizer, LocalSteps
from deltaserve.torch._options import RemoteOptions
from deltaserve.torch._overlap import Overlap
from deltaserve.torch._states import assign_names, from_torch, model_state_of, to_torch
from deltaserve.torch._tensors import WeightReceiver, gradient_of, to_host

_log = logging.getLogger("deltaserve")


class RemoteOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose weights and state live on a deltaserve server; its subclasses are the optimizers.

    `step()` pushes the gradients, waits until they are part of an update, and writes the new weights into the
    parameters. Processes that use the same `model` train it together; `policy` says how their gradients combine.

    The first worker creates the model from its own weights. A worker that joins later starts from the server's: they
    are in its parameters as soon as the optimizer is constructed. The server keeps weights and state in float32,
    whatever the dtype of the parameters.

    A subclass takes the arguments of its torch class, with their defaults, as keyword arguments. `foreach` and `fused`
    have no effect, since the server makes the update. `capturable`, `differentiable` and `eps=0` are refused.

    Hyperparameters may change at any time, for instance by a scheduler: each push carries those of its parameter
    groups. What decides which state exists is fixed when the model is created, and the same for all groups: `amsgrad`,
    `centered`, `nesterov`, and whether `momentum` is 0.

    The server holds the only weights that count, and `step()` overwrites the parameters. To set weights yourself, for
    instance with `module.load_state_dict()`, do it before you construct the optimizer; or call the optimizer's
    `load_state_dict()` afterwards, which puts both weights and state on the server.

    A gradient that is too stale is skipped: its synchronous round has closed without it, or it is older than
    `max_staleness` allows. `step()` then logs a warning, sets `last_result` to None and writes the newer weights into
    the parameters.

    With `local_optimizer`, each worker trains on its own for `local_steps` steps and then pushes how far its weights
    have moved, as one gradient. The optimizer on the server is then the outer one (Reddi et al., 2020,
    arXiv:2003.00295; DiLoCo: Douillard et al., 2023, arXiv:2311.08105). The local optimizer keeps its state across
    pushes.

    Args:
        params: Parameters, parameter groups or named parameters, as `torch.optim` takes them. Names become the names
            of the tensors on the server; parameters without a name are called by group and position, such as "0.1".
        target: HOST:PORT of the server, or unix:PATH.
        arguments: The arguments of the torch class, by name.
        model: The model's name on the server.
        policy: When pushes become an update, if this worker creates the model; a worker that joins must pass the same.
            None means `deltaserve.Async()`.
        worker: This worker's name, unique within the model; None generates one.
        local_steps: How many steps of the local optimizer make one push.
        local_optimizer: Makes the local optimizer, for instance `functools.partial(torch.optim.SGD, lr=0.1)`. None
            means that every step pushes its gradients.
        overlap: Whether to send each gradient as soon as backward has computed it. The results are the same, bit for
            bit. It shortens a step where backward leaves a processor core idle, as on a GPU. It costs a second copy of
            the gradients in memory, and a thread of the server during backward. It needs gradients that reach `step()`
            as one backward pass computed them: with clipping, unscaling or accumulation it warns after a few steps and
            switches itself off. It has no effect on a model that fits into one message (1 MiB) or uses shared memory.
        transport: How weights and gradients travel. "auto" uses shared memory if the server runs on this host as the
            same user and allows it; "stream" never does; "shared" fails if shared memory is not available.
        wire: The type of the elements in messages, in both directions: "float32", "bfloat16" or "float16".
        timeout_seconds: The limit for one call, including its retries and the wait for a round.
        credentials: Opens the channel to the server; None means a plaintext channel.

    Raises:
        ValueError: A hyperparameter is out of range, groups differ in what is fixed, `local_steps` is above 1 without
            `local_optimizer`, `overlap` is combined with `local_optimizer`, two parameters have the same name, or
            `transport` or `wire` is unknown.
        TypeError: A parameter is not a real floating-point tensor.
        ConflictError: The model exists and differs from this one; the message says in what.
        RequestError: The server refuses a name, a shape, a hyperparameter or a weight.
        UnavailableError: The server cannot be reached within the timeout.
    """

    _torch_class: ClassVar[type[torch.optim.Optimizer]]

    def __init__(
        self,
        params: Any,
        target: str,
        arguments: Mapping[str, Any],
        *,
        model: str,
        policy: Policy | None = None,
        worker: str | None = None,
        local_steps: int = 1,
        local_optimizer: LocalOptimizer | None = None,
        overlap: bool = False,
        transport: TransportName = "auto",
        wire: WireType = "float32",
        timeout_seconds: float = 120.0,
        credentials: Credentials | None = None,
    ) -> None:
        if type(self) is RemoteOptimizer:
            raise TypeError(
                "RemoteOptimizer is what the drop-ins have in common: use one of them, or RemoteOptimizer.of()"
            )
        # All options are checked first: a mistake must not leave a model behind on the server.
        if local_steps < 1 or (local_steps > 1 and local_optimizer is None):
            raise ValueError(f"local_steps: expected 1, or more with a local_optimizer, got {local_steps}")
        if overlap and local_optimizer:
            raise ValueError("overlap: not possible with local_optimizer, which pushes differences, not gradients")
        check_transport(transport)
        elements = named(wire, TORCH_ELEMENT_TYPES)
        self._worker: Worker | None = None
        self._worker_name = worker
        self._version: int | None = None  # of the weights in the parameters; None before the first pull
        self._names: dict[Tensor, str] = {}
        self._receiver = WeightReceiver()
        self._uses_local_optimizer = local_optimizer is not None
        self._local: LocalSteps | None = None
        self._uses_overlap = overlap
        self._overlap: Overlap | None = None
        super().__init__(params, torch_defaults(self._torch_class, arguments))
        self._client = connect(target, timeout_seconds=timeout_seconds, credentials=credentials)
        try:
            self._model = self._create_or_join_model(model, policy)
            self._open_worker = partial(self._model._worker, lease_seconds=None, transport=transport, wire=elements)
            if local_optimizer:
                self._local = LocalSteps(self.param_groups, local_optimizer, local_steps)
            self._open_session()
        except BaseException:
            self._client.close()
            raise

    @staticmethod
    def of(
        optimizer: torch.optim.Optimizer, target: str, *, model: str, **options: Unpack[RemoteOptions]
    ) -> "RemoteOptimizer":
        """Puts a torch optimizer, with its parameter groups and state, onto a server, and returns its drop-in.

        Use the drop-in in its place from then on, and make schedulers for it. If the model exists, this worker joins
        it: as with the constructor, the weights and the state on the server count, and those of `optimizer` do not.

        The model exists for a moment before its state does, and an update that another worker makes in between is lost.
        So call this in one worker before the others start, or under `Sync(min_workers=N)` in all N workers before their
        first step.

        Args:
            optimizer: A `torch.optim` optimizer, of exactly one of the classes that have a drop-in.
            target: See the class, as for `model` and `options`.
            model: The model's name on the server.

        Raises:
            TypeError: The optimizer is of another class.
            ValueError: Its state does not fit its hyperparameters.

        Example:
            >>> import deltaserve_server
            >>> net = torch.nn.Linear(2, 1)
            >>> local = torch.optim.AdamW(net.parameters(), lr=0.01)
            >>> with deltaserve_server.LocalServer() as server:
            ...     with RemoteOptimizer.of(local, server.target, model="line") as optimizer:
            ...         net(torch.ones(1, 2)).square().sum().backward()
            ...         optimizer.step()
            ...     type(optimizer).__name__
            'RemoteAdamW'
        """
        torch_class, state = torch_class_of(optimizer), model_state_of(optimizer)
        if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
            _log.warning(
                "model %s: a scheduler of the torch optimizer does not change the drop-in: make one for it", model
            )
        remote_class: Any = next(c for c in RemoteOptimizer.__subclasses__() if c._torch_class is torch_class)
        groups = [dict(group) for group in optimizer.param_groups]
        arguments = arguments_of(torch_class, optimizer.defaults)
        remote: RemoteOptimizer = remote_class(groups, target, model=model, **arguments, **options)
        if remote._model.created and optimizer.state:
            try:
                remote._model.put_state(state)
                remote._pull()
            except BaseException:
                with suppress(Error):
                    remote._model.delete()  # else the next attempt would join a model without the state
                remote.close()
                raise
        return remote

    @property
    def rank(self) -> int:
        """The lowest rank that no other live worker of the model had when this worker joined; 0 for the first."""
        return self._joined.rank

    @property
    def version(self) -> int:
        """The version of the weights in the parameters, before any local steps."""
        return self._joined.version

    @property
    def last_result(self) -> StepResult | None:
        """The result of the last push; None before the first push, and after one that was skipped or refused."""
        return self._joined.last_result

    @property
    def local_optimizer(self) -> torch.optim.Optimizer | None:
        """The local optimizer, for schedulers and checkpoints; None without local steps."""
        return self._local.optimizer if self._local else None

    @overload
    def step(self, closure: None = None, *, weight: float = 1.0) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, weight: float = 1.0) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, weight: float = 1.0) -> float | None:
        """Pushes the gradients and writes the new weights into the parameters; or makes a local step.

        If it raises without a `reason` or is interrupted, the server may have accepted the push all the same. Call it
        again with the same gradients: it finds out, and the push counts once.

        Args:
            closure: Reevaluates the model, computes gradients and returns the loss.
            weight: How much the gradients count in the mean of their round, for instance the number of samples. The
                weights of local steps add up.

        Returns:
            The closure's loss; None without a closure.

        Raises:
            Error: See `deltaserve.Worker.step`. If the connection broke while weights arrived, the parameters may mix
                two versions; the next step skips its gradients and writes whole weights.
        """
        try:
            if not self._is_current():
                self._catch_up()
                return _evaluate(closure)
            if self._local:
                return self._step_locally(self._local, closure, weight)
            loss = _evaluate(closure)
            self._push({name: gradient_of(param) for name, param in self._params().items()}, weight)
            return loss
        finally:
            if self._overlap:
                self._overlap.next()

    @torch.no_grad()
    def flush(self) -> None:
        """Pushes the local steps made since the last push, if any. Call it at the end of training.

        Raises:
            Error: See `step`.
        """
        if not self._is_current():
            self._catch_up()
        elif self._local:
            self._push_local_steps(self._local)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group to the optimizer and to the model on the server.

        The server takes this worker's weights for it, unless another worker has added the same group before.
        """
        if self._worker:
            self.flush()
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        group = self.param_groups[index]
        try:
            self._check_groups([group])
            if self._uses_local_optimizer and group["maximize"]:
                raise ValueError("maximize: set it on the local optimizer, which makes the steps")
            assign_names(self._names, index, group)  # once: load_state_dict may replace "param_names" later
            if self._worker:
                tensors, group_of = self._layout(from_group=index)
                self._model.extend(tensors, groups=self._optimizers()[index:], group_of=group_of)
        except BaseException:
            for param in self.param_groups.pop()["params"]:
                self._names.pop(param, None)
            raise
        if self._worker:
            if self._local:
                self._local.optimizer.add_param_group({"params": param_group["params"]})
            previous = self._worker
            self._open_session()  # first, so that it takes the place of the previous session in a round
            previous.close()

    def state_dict(self) -> dict[str, Any]:
        """Returns a state dict of the torch class, with the present state on the server."""
        # torch's hooks and its state_dict() read self.state, which is filled for as long as they run.
        self.state.update(to_torch(self._model.pull_state(), self._model.groups[0], self._params()))
        try:
            return super().state_dict()
        finally:
            self._clear_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts a state dict on the server, together with the present values of the parameters.

        The state dict may come from the torch class or from this one. It replaces weights and state for every worker
        of the model: call this in one worker before the others start, or under `Sync(min_workers=N)` in all N workers
        before their first step. The state of `torch.optim.SGD` has no counts of updates: they start over.

        Raises:
            ValueError: It does not fit the parameters, is of another structure than the model, such as with `amsgrad`
                or without, or its hyperparameters are out of range. Nothing has changed.
            Error: See `deltaserve.Model.put_state`.
        """
        groups = self.param_groups
        try:
            super().load_state_dict(state_dict)
            self._model.put_state(from_torch(self.state, self._model.groups[0], self._params()))
        except BaseException:
            self.param_groups = groups
            raise
        finally:
            self._clear_state()
        self._pull()  # the server has rounded to float32, and has made a new version

    def close(self) -> None:
        """Ends this worker's session and closes the connection; at the latest this happens when the process exits."""
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
        """Puts a loaded state dict in place, for torch."""
        complete_groups(self._torch_class, state["param_groups"])
        self._check_groups(state["param_groups"])
        super().__setstate__(state)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} is a connection and cannot be copied or pickled: save its state_dict() instead"
        )

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__reduce__()

    # --- the model and the session

    def _create_or_join_model(self, name: str, policy: Policy | None) -> Model:
        """Creates the model or joins it; a model that another worker laid out in another order keeps its order."""
        tensors, group_of = self._layout()
        create = partial(self._client.create_model, name, groups=self._optimizers(), group_of=group_of, policy=policy)
        try:
            return create(tensors)
        except ConflictError:
            existing = [spec.name for spec in self._client.model(name).tensors if spec.name in tensors]
            reordered = {key: tensors[key] for key in dict.fromkeys([*existing, *tensors])}
            if list(reordered) == list(tensors):
                raise
        return create(reordered)

    def _open_session(self) -> None:
        """Opens a session as a new worker, and takes its weights."""
        self._worker = self._open_worker(self._worker_name)
        self._worker_name = self._worker.name
        self._pull()
        if self._overlap:
            self._overlap.close()
        if self._uses_overlap:
            self._overlap = Overlap(self, weakref.WeakMethod(self._begin_push), self._joined.tensors, self._params())

    @property
    def _joined(self) -> Worker:
        assert self._worker is not None
        return self._worker

    def _is_current(self) -> bool:
        """Whether the parameters hold the worker's weights; not so after an interrupt between the two."""
        return self._version == self._joined.version

    def _catch_up(self) -> None:
        _log.warning("worker %s: skipped a gradient of weights that had arrived only in part", self._joined.name)
        self._pull()

    @torch.no_grad()
    def _pull(self) -> None:
        self._joined.pull(out=self._receiver.arrays(self._params()))
        self._commit()

    def _commit(self) -> None:
        """Moves received weights into the parameters."""
        self._receiver.commit(self._params())
        if self._local:
            self._local.start(self._params())
        self._version = self._joined.version  # last: an interrupt before this makes the next step start with a pull

    # --- pushes

    def _push(self, gradients: dict[str, Array | None], weight: float) -> None:
        """Pushes gradients and takes the new weights; a gradient that is too stale is skipped."""
        worker = self._joined
        if self._overlap:
            worker._take_over(self._overlap.end(gradients, weight))
        out = self._receiver.arrays(self._params())
        try:
            worker.step(gradients, hyperparameters=self._optimizers(), weight=weight, out=out)
        except StaleGradientError as error:
            base = error.metadata.get("base")
            reason = f"it is of version {base}, which is too stale; now at {worker.version}" if base else error
            _log.warning("worker %s: skipped a gradient: %s", worker.name, reason)
        except BaseException:
            if not self._is_current():  # new weights arrived before the failure
                self._commit()
            raise
        self._commit()

    def _begin_push(self, push: OverlappedPush, absent: list[int], weight: float) -> bool:
        """Begins the next push with the present hyperparameters, in the thread of an `Overlap`."""
        return self._is_current() and self._joined._begin(push, absent, self._optimizers(), weight)

    def _step_locally(self, local: LocalSteps, closure: Callable[[], float] | None, weight: float) -> float | None:
        """Makes a local step, and a push if one is due."""
        if local.push_unsettled:
            self._push_local_steps(local)
            if closure is None:  # there is no way to compute the gradients again
                _log.warning("worker %s: skipped a gradient of weights from before a retried push", self._joined.name)
                return None
        loss = local.step(closure, weight)
        if local.due:
            self._push_local_steps(local)
        return loss

    def _push_local_steps(self, local: LocalSteps) -> None:
        """Pushes what the local steps have changed; if the server refuses that for good, undoes them."""
        if not local.pending:
            return
        try:
            self._push(local.gradient(), local.weight)
        except RequestError:  # for instance because the local steps have diverged
            local.undo()
            raise

    # --- parameters

    def _params(self, from_group: int = 0) -> dict[str, Tensor]:
        """Returns the parameters by tensor name."""
        return {self._names[param]: param for group in self.param_groups[from_group:] for param in group["params"]}

    def _layout(self, from_group: int = 0) -> tuple[dict[str, Array], dict[str, int]]:
        """Returns the parameters' values, and the index of each one's group.

        They are in reverse order, which is about the order in which backward computes gradients, so that `overlap` can
        send them as they come.
        """
        tensors = {name: to_host(param) for name, param in reversed(self._params(from_group).items())}
        groups = enumerate(self.param_groups[from_group:], from_group)
        return tensors, {self._names[param]: index for index, group in groups for param in group["params"]}

    def _optimizers(self) -> list[Optimizer]:
        """Returns the present hyperparameters by group."""
        return optimizers_of(self._torch_class, self.param_groups, self.defaults)

    def _check_groups(self, groups: list[dict[str, Any]]) -> None:
        """Checks the hyperparameters of new or loaded groups, and that they have the model's structure."""
        optimizers = [check_group(self._torch_class, group, self.defaults) for group in groups]
        check_structure(self._model.groups[0] if self._worker else self._optimizers()[0], optimizers)

    def _clear_state(self) -> None:
        """Removes the parameters' state, which is on the server; entries that hooks have added stay."""
        for param in self._params().values():
            self.state.pop(param, None)


def _evaluate(closure: Callable[[], float] | None) -> float | None:
    with torch.enable_grad():
        return closure() if closure else None
