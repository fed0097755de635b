"""Health: whether the server, each service and each model serves."""

from collections.abc import Iterable

from grpc_health.v1 import health, health_pb2

from deltaserve_server.engine.events import ModelDeleted, ModelServed, Observer

_OWN_SERVICES = "deltaserve.v1."
"""What the full names of deltaserve's services begin with. A model of such a name must not speak for a service."""


class HealthServicer(health.HealthServicer, Observer):  # type: ignore[misc]  # grpc_health has no types
    """grpc_health's servicer; learns of models as an observer."""

    def set_services(self, names: Iterable[str], *, serving: bool) -> None:
        """Sets the status of services; "" is the server as a whole."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in names:
            self.set(name, status)

    def model_served(self, event: ModelServed) -> None:
        self._set_model(event.model, health_pb2.HealthCheckResponse.SERVING)

    def model_deleted(self, event: ModelDeleted) -> None:
        self._set_model(event.model, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)

    def _set_model(self, name: str, status: "health_pb2.HealthCheckResponse.ServingStatus") -> None:
        if not name.startswith(_OWN_SERVICES):  # the name of a model is the client's choice
            self.set(name, status)
