"""The adapter of deltaserve itself, one variant per transport."""

from functools import partial
from multiprocessing.connection import Connection
from tempfile import TemporaryDirectory

import deltaserve
from benchmarks.models import gradients_of, named, shapes_of, weights_of
from benchmarks.peers.common import EPS, LR, RHO, Client, main, run_processes
from benchmarks.processes import TRANSPORTS
from deltaserve_server import Server, ServerConfig

_BY_NAME = {transport.name: transport for transport in TRANSPORTS}


def serve(connection: Connection, workload: str, variant: str, workers: int) -> None:
    """Runs the server."""
    with TemporaryDirectory(prefix="deltaserve-") as folder:
        config = ServerConfig(bind=_BY_NAME[variant].bind.format(folder=folder), device="cpu")
        with Server(config) as server, deltaserve.connect(server.target) as client:
            connection.send(("ready", server.target))
            while connection.recv() == "count":
                connection.send(("count", client.model("bench").info().version))


def connect(address: str, workload: str, variant: str, rank: int, workers: int) -> Client:
    """Opens a worker; the first one creates the model."""
    client = deltaserve.connect(address)
    optimizer = deltaserve.Adadelta(lr=LR, rho=RHO, eps=EPS)
    model = client.create_model("bench", named(weights_of(shapes_of(workload))), optimizer=optimizer)
    worker = model.worker(**_BY_NAME[variant].worker)
    gradients = named(gradients_of(shapes_of(workload)))
    return Client(lambda: worker.step(gradients), lambda: list(worker.weights.values()), client.close)


if __name__ == "__main__":
    main(list(_BY_NAME), partial(run_processes, "benchmarks.peers.ours"))
