"""A connection to a server, and the models behind it."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from numpy.typing import ArrayLike

from deltaserve._common.flat_vector import contiguous
from deltaserve._common.optimizers import Adadelta, Optimizer
from deltaserve._common.policies import Async, Policy, from_policy
from deltaserve._connection import Connection
from deltaserve._conversion import from_groups, from_tensors, to_model_info, to_model_summary, to_server_info
from deltaserve._credentials import Credentials
from deltaserve._model import Model, tensor_specs, vector_messages
from deltaserve._types import ModelSummary, ServerInfo
from deltaserve.v1 import common_pb2, model_service_pb2, system_service_pb2


def connect(target: str, *, timeout_seconds: float = 120.0, credentials: Credentials | None = None) -> "Client":
    """Returns a client of the server at `target`; its first call opens the connection.

    Args:
        target: HOST:PORT, or unix:PATH.
        timeout_seconds: Limit of each call in seconds, including its retries and the wait for a round.
        credentials: Opens the channel to the server; None means a plaintext channel.

    Raises:
        ValueError: `target` is no address, or `timeout_seconds` is not a finite number above 0.

    Example:
        >>> with connect("localhost:50051") as client:
        ...     client.models()  # doctest: +SKIP
    """
    return Client(target, timeout_seconds=timeout_seconds, credentials=credentials)


class Client:
    """A connection to a server; a context manager that closes it.

    Every method that asks the server raises `UnavailableError` if the server does not answer within the timeout.

    Args:
        target: HOST:PORT, or unix:PATH.
        timeout_seconds: Limit of each call in seconds, including its retries and the wait for a round.
        credentials: Opens the channel to the server; None means a plaintext channel.

    Raises:
        ValueError: `target` is no address, or `timeout_seconds` is not a finite number above 0.
    """

    def __init__(self, target: str, *, timeout_seconds: float = 120.0, credentials: Credentials | None = None) -> None:
        self._connection = Connection(target, timeout_seconds, credentials)

    @property
    def target(self) -> str:
        """HOST:PORT of the server, or unix:PATH."""
        return self._connection.target

    def server_info(self) -> ServerInfo:
        """Returns the server's version, device and limits."""
        return to_server_info(self._connection.call("GetServerInfo", system_service_pb2.GetServerInfoRequest()))

    def models(self) -> list[ModelSummary]:
        """Returns a summary of every model, by name."""
        answer = self._connection.call("ListModels", model_service_pb2.ListModelsRequest())
        return [to_model_summary(model) for model in answer.models]

    def model(self, name: str) -> Model:
        """Returns an existing model.

        Raises:
            RequestError: There is no model of this name.
        """
        info = to_model_info(self._connection.call("GetModel", model_service_pb2.GetModelRequest(model=name)))
        return Model(self._connection, name, info.tensors, info.groups, info.policy, created=False)

    def create_model(
        self,
        name: str,
        tensors: Mapping[str, ArrayLike],
        *,
        optimizer: Optimizer | None = None,
        groups: Sequence[Optimizer] | None = None,
        group_of: Mapping[str, int] | None = None,
        policy: Policy | None = None,
    ) -> Model:
        """Creates a model, or joins the existing one of this name, which keeps its weights.

        Args:
            name: 1 to 128 characters of A-Z a-z 0-9 . _ -, the first a letter or a digit.
            tensors: Initial weights by tensor name, converted to float32. Their order is the layout.
            optimizer: The optimizer of a model with one parameter group; None means `Adadelta()`.
            groups: The optimizer by parameter group, for a model with several: of one kind, each with its
                hyperparameters.
            group_of: Index of a tensor's parameter group, by tensor name; 0 for tensors that it leaves out.
            policy: When a push becomes an update; None means `Async()`.

        Raises:
            TypeError: `policy` is not a policy, `optimizer` or a group is not an optimizer, or a tensor does not
                consist of real numbers.
            ValueError: `optimizer` and `groups` are both given, or `group_of` names a tensor that `tensors` lacks.
            RequestError: A name, a shape or a hyperparameter is not allowed, or the server lacks the optimizer.
            ConflictError: A model of this name exists and differs; the message says how.
            UnavailableError: The server has no memory left for the model.
        """
        if optimizer is not None and groups is not None:
            raise ValueError("optimizer, groups: give one of them")
        # Converted once, and not again for each attempt.
        arrays = {key: contiguous(value) for key, value in tensors.items()}
        specs = tensor_specs(arrays, group_of)
        config = common_pb2.ModelConfig(
            name=name,
            tensors=from_tensors(specs),
            groups=from_groups(groups or (Adadelta() if optimizer is None else optimizer,)),
            policy=from_policy(Async() if policy is None else policy),
        )
        kind, weights = model_service_pb2.CreateModelRequest, list(arrays.values())
        # A function, because each attempt needs a stream from its beginning.
        answer = self._connection.send("CreateModel", lambda: vector_messages(kind, config, [weights]))
        info = to_model_info(self._connection.call("GetModel", model_service_pb2.GetModelRequest(model=name)))
        known = info.groups[: len(config.groups)]  # another worker may have extended the model since
        return Model(self._connection, name, specs, known, info.policy, answer.created)

    def delete_model(self, name: str) -> None:
        """Deletes a model; its workers' next calls fail.

        Raises:
            RequestError: There is no model of this name.
        """
        self._connection.call("DeleteModel", model_service_pb2.DeleteModelRequest(model=name))

    def close(self) -> None:
        """Closes the open workers, then the connection; calls in progress end."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
