"""What a worker says when the server was restarted and has not all that the worker knows."""

from deltaserve._connection import Connection, incarnation
from deltaserve._errors import Error, RequestError, RolledBackError, StateLostError
from deltaserve.v1 import common_pb2


def rolled_back(worker: str, model: str, version: int, restored: int, lost: range) -> RolledBackError:
    """Returns what a worker raises whose weights, or pushes, are gone.

    Args:
        worker: Its name.
        model: The model's.
        version: The version that its weights have.
        restored: The last version before that which is not lost.
        lost: Numbers of its pushes that are.
    """
    pushes = f"pushes {lost[0]} to {lost[-1]} of this worker" if lost else "no push of this worker"
    return RolledBackError(
        f"worker {worker}: the server was restarted and has gone back to version {restored} of model {model}: what "
        f"came after is lost, {pushes} among it. The gradient is of version {version} and is left out; a new session "
        "is open, and the weights of now are in place",
        version=version,
        restored_version=restored,
        lost_pushes=lost,
    )


def explained(error: Error, connection: Connection, model: str, before: common_pb2.ModelPosition) -> Error:
    """Returns an error, or what it means where the server was restarted without what the worker knows.

    Args:
        error: What the server said.
        connection: To it.
        model: The model's name.
        before: Where the model stood, as far as the worker knows.
    """
    gone = error.reason in ("MODEL_NOT_FOUND", "LINEAGE_UNKNOWN")
    if isinstance(error, RequestError) and error.metadata.get("field") in ("tensor_count", "group_count"):
        text = (
            f"the server at {connection.target} was restarted from a state of model {model} that is older than a part "
            "of its layout: extend the model again"
        )
    elif not gone or incarnation(connection) in (None, before.incarnation):
        return error
    else:
        text = (
            f"the server at {connection.target} was restarted and has lost model {model}: its weights and state of "
            f"version {before.version} were not durable ({before.version} updates). Start it again from your own "
            "weights"
        )
    return StateLostError(text, reason=error.reason, metadata=error.metadata)
