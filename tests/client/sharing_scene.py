"""Helpers for tests of shared memory between processes."""

from pathlib import Path
from typing import Any

import numpy as np

from deltaserve import Client

SIZE = 300_001
BYTES = 4 * SIZE


def ones(value: float = 1.0) -> dict[str, Any]:
    return {"w": np.full(SIZE, value, np.float32)}


def free(client: Client) -> int:
    return client.server_info().limits.memory_available_bytes


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def twin(client: Client, *values: float) -> Any:
    with client.create_model("twin", ones(0)).worker(transport="stream") as worker:
        for value in values:
            worker.step(ones(value))
        return worker.weights["w"].copy()


BEGIN = """
import os, signal, sys, time
import numpy as np
import deltaserve

SIZE = int(sys.argv[2])
def ones(value=1.0):
    return {"w": np.full(SIZE, value, np.float32)}
def connect():
    client = deltaserve.connect(sys.argv[1], timeout_seconds=20)
    return client, client.model("m")
"""

SHARES = """
client, model = connect()
worker = model.worker("a", lease_seconds=5.0)  # tests wait for its end, and the default is long
assert getattr(worker._membership.transport(), "memory", None) is not None
"""
