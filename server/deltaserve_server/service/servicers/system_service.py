"""SystemService: the server itself."""

from time import monotonic

import grpc

import deltaserve
from deltaserve.v1 import common_pb2 as pb
from deltaserve.v1 import system_service_pb2 as rpc
from deltaserve_server.config import Device
from deltaserve_server.engine.catalog import ModelCatalog


class SystemServicer:
    """Serves SystemService.

    Args:
        registry: The server's models and limits.
        device: What holds the vectors.
    """

    def __init__(self, catalog: ModelCatalog, device: Device) -> None:
        self._catalog = catalog
        self._device = device
        self._started = monotonic()

    def GetServerInfo(self, _request: rpc.GetServerInfoRequest, _: grpc.ServicerContext) -> rpc.GetServerInfoResponse:
        """The server's version, limits and device."""
        config = self._catalog.config
        return rpc.GetServerInfoResponse(
            version=deltaserve.__version__,
            incarnation=self._catalog.incarnation,
            device=rpc.Device(kind=self._device.kind, name=self._device.name, threads=self._device.threads),
            limits=rpc.Limits(
                message_bytes=config.message_bytes,
                models=config.models,
                sessions=config.sessions,
                watchers=config.watchers,
                memory_bytes=self._catalog.memory.total,
                memory_available_bytes=self._catalog.memory.available,
                staged_bytes=self._catalog.staged.total,
                lease_seconds_min=config.lease_seconds_min,
                lease_seconds_max=config.lease_seconds_max,
                lease_seconds_default=config.lease_seconds,
            ),
            durability=pb.Durability.Value(f"DURABILITY_{config.keeps.upper()}"),
            uptime_seconds=monotonic() - self._started,
        )
