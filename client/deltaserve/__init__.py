"""deltaserve: an optimizer as a service. This package is the worker's side.

Example:
    >>> import numpy as np
    >>> import deltaserve, deltaserve_server
    >>> with deltaserve_server.LocalServer() as server, deltaserve.connect(server.target) as client:
    ...     model = client.create_model("line", {"w": np.zeros(2, np.float32)})
    ...     with model.worker() as worker:
    ...         weights = worker.step({"w": np.ones(2, np.float32)})
    >>> weights["w"].shape
    (2,)
"""

from deltaserve._client import Client, connect
from deltaserve._common.optimizers import SGD, Adadelta, Adagrad, Adam, AdamW, Lion, Optimizer, RMSprop
from deltaserve._common.policies import Async, Bounded, Sync
from deltaserve._errors import (
    ConflictError,
    Error,
    RequestError,
    RolledBackError,
    ServerError,
    SessionError,
    StaleGradientError,
    StateLostError,
    UnavailableError,
)
from deltaserve._model import Model
from deltaserve._types import (
    Contribution,
    Limits,
    ModelEvent,
    ModelInfo,
    ModelState,
    ModelSummary,
    PushStatus,
    ServerInfo,
    SessionInfo,
    SnapshotInfo,
    StepResult,
    TensorSpec,
)
from deltaserve._version import __version__
from deltaserve._worker import Worker

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Async",
    "Bounded",
    "Client",
    "ConflictError",
    "Contribution",
    "Error",
    "Limits",
    "Lion",
    "Model",
    "ModelEvent",
    "ModelInfo",
    "ModelState",
    "ModelSummary",
    "Optimizer",
    "PushStatus",
    "RMSprop",
    "RequestError",
    "RolledBackError",
    "ServerError",
    "ServerInfo",
    "SessionError",
    "SessionInfo",
    "SnapshotInfo",
    "StaleGradientError",
    "StateLostError",
    "StepResult",
    "Sync",
    "TensorSpec",
    "UnavailableError",
    "Worker",
    "__version__",
    "connect",
]
