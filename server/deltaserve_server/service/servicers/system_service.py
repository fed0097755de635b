"""SystemService: the server itself."""

import grpc

import deltaserve
from deltaserve._common.optimizers import OPTIMIZERS
from deltaserve.v1 import common_pb2 as pb
from deltaserve.v1 import system_service_pb2 as rpc
from deltaserve_server.config import Device
from deltaserve_server.engine.catalog import ModelCatalog


class SystemServicer:
    """Serves SystemService; `device` holds the models' vectors."""

    def __init__(self, catalog: ModelCatalog, device: Device) -> None:
        self._catalog = catalog
        self._device = device
        self._started = catalog.clock.monotonic()

    def GetServerInfo(self, _request: rpc.GetServerInfoRequest, _: grpc.ServicerContext) -> rpc.GetServerInfoResponse:
        config, quotas = self._catalog.config, self._catalog.quotas
        return rpc.GetServerInfoResponse(
            version=deltaserve.__version__,
            incarnation=self._catalog.incarnation,
            device=rpc.Device(kind=self._device.kind, name=self._device.name, threads=self._device.threads),
            limits=rpc.Limits(
                message_bytes=config.message_bytes,
                models=config.models,
                sessions=config.sessions,
                watchers=config.watchers,
                memory_bytes=quotas.memory.total,
                memory_available_bytes=quotas.memory.available,
                staged_bytes=quotas.staged.total,
                lease_seconds_min=config.lease_seconds_min,
                lease_seconds_max=config.lease_seconds_max,
                lease_seconds_default=config.lease_seconds,
            ),
            durability=pb.Durability.Value(f"DURABILITY_{config.effective_durability.upper()}"),
            uptime_seconds=self._catalog.clock.monotonic() - self._started,
            optimizers=list(OPTIMIZERS),
        )
