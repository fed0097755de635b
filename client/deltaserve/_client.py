"""A connection to a server, and the models behind it."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from numpy.typing import ArrayLike

from deltaserve._common.flat_vector import contiguous
from deltaserve._connection import Connection
from deltaserve._model import Model, tensor_specs, weight_messages
from deltaserve._types import (
    Async,
    Hyperparameters,
    ModelSummary,
    Policy,
    ServerInfo,
    from_policy,
    from_tensors,
    to_model_info,
    to_model_summary,
    to_server_info,
)
from deltaserve.v1 import common_pb2, model_service_pb2, system_service_pb2


def connect(target: str, *, timeout_seconds: float = 120.0) -> "Client":
    """Returns a client of the server at `target`; the connection is made with the first call.

    Args:
        target: HOST:PORT, or unix:PATH.
        timeout_seconds: How long any call may take in all, its retries and the wait for a round included.

    Raises:
        ValueError: `target` is no address, or `timeout_seconds` not more than 0.

    Example:
        >>> with connect("localhost:50051") as client:
        ...     client.models()  # doctest: +SKIP
    """
    return Client(target, timeout_seconds=timeout_seconds)


class Client:
    """A connection to a server; a context manager that closes it.

    Every method that asks the server raises `UnavailableError` where it is not reached within the timeout.

    Args:
        target: HOST:PORT, or unix:PATH.
        timeout_seconds: How long any call may take in all, its retries and the wait for a round included.

    Raises:
        ValueError: `target` is no address, or `timeout_seconds` not more than 0.
    """

    def __init__(self, target: str, *, timeout_seconds: float = 120.0) -> None:
        self._connection = Connection(target, timeout_seconds)

    @property
    def target(self) -> str:
        """HOST:PORT of the server, or unix:PATH."""
        return self._connection.target

    def server_info(self) -> ServerInfo:
        """Returns the server's version, device and limits."""
        return to_server_info(self._connection.call("GetServerInfo", system_service_pb2.GetServerInfoRequest()))

    def models(self) -> list[ModelSummary]:
        """Returns every model in a line, by name."""
        answer = self._connection.call("ListModels", model_service_pb2.ListModelsRequest())
        return [to_model_summary(model) for model in answer.models]

    def model(self, name: str) -> Model:
        """Returns a model that exists.

        Raises:
            RequestError: There is none of this name.
        """
        info = to_model_info(self._connection.call("GetModel", model_service_pb2.GetModelRequest(model=name)))
        return Model(self._connection, name, info.tensors, info.groups, info.policy, created=False)

    def create_model(
        self,
        name: str,
        tensors: Mapping[str, ArrayLike],
        *,
        lr: float = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        maximize: bool = False,
        groups: Sequence[Hyperparameters] | None = None,
        group_of: Mapping[str, int] | None = None,
        policy: Policy | None = None,
    ) -> Model:
        """Creates a model, or joins the one of this name, whose weights then stay as they are.

        Args:
            name: 1 to 128 characters of A-Z a-z 0-9 . _ -, the first a letter or a digit.
            tensors: Initial weights by tensor name, converted to float32. Their order is the layout.
            lr: As in `Hyperparameters`, for a model of one parameter group.
            rho: Likewise.
            eps: Likewise.
            weight_decay: Likewise.
            maximize: Likewise.
            groups: Hyperparameters by parameter group, in place of the five above.
            group_of: By tensor name: the index of its group; 0 where there is none.
            policy: When a push becomes an update; None means `Async()`.

        Raises:
            TypeError: `policy` is none, or a tensor does not consist of real numbers.
            ValueError: `group_of` has a tensor that is not among them.
            RequestError: A name, a shape or a hyperparameter is not allowed.
            ConflictError: A model of this name exists and differs; the message says in what.
            UnavailableError: The server has no room for it.
        """
        arrays = {key: contiguous(value) for key, value in tensors.items()}
        one = Hyperparameters(lr=lr, rho=rho, eps=eps, weight_decay=weight_decay, maximize=maximize)
        specs = tensor_specs(arrays, group_of)
        config = common_pb2.ModelConfig(
            name=name,
            tensors=from_tensors(specs),
            groups=[group._to_proto() for group in (groups if groups is not None else (one,))],
            policy=from_policy(Async() if policy is None else policy),
        )
        kind = model_service_pb2.CreateModelRequest
        answer = self._connection.send("CreateModel", lambda: weight_messages(kind, config, list(arrays.values())))
        info = to_model_info(self._connection.call("GetModel", model_service_pb2.GetModelRequest(model=name)))
        known = info.groups[: len(config.groups)]  # others may have extended it since
        return Model(self._connection, name, specs, known, info.policy, answer.created)

    def delete_model(self, name: str) -> None:
        """Forgets a model; its workers' next calls fail.

        Raises:
            RequestError: There is none of this name.
        """
        self._connection.call("DeleteModel", model_service_pb2.DeleteModelRequest(model=name))

    def close(self) -> None:
        """Closes the workers that are still open, then the connection; calls under way end."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
