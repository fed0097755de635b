"""The adapter of TensorFlow's ParameterServerStrategy over gRPC: chief, parameter server and workers.

A step is a closure on a worker. The parameter server applies the worker's gradient with the fused kernel of tf_keras'
legacy Adadelta, and the worker reads every variable back. One element of each goes to the chief, so that no read is
optimized away. The chief measures the time.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

from benchmarks import machine
from benchmarks.models import gradients_of, shapes_of, weights_of
from benchmarks.peers.common import EPS, LR, RHO, Client, Meter, Record, free_port, judge, main, plan, timed

_QUEUE = 80
"""Steps that the chief schedules before it waits, in workload c."""

_SERVER = """
import tensorflow as tf
found = tf.distribute.cluster_resolver.TFConfigClusterResolver()
tf.distribute.Server(found.cluster_spec(), job_name=found.task_type, task_index=found.task_id, protocol="grpc").join()
"""


def run(workload: str, variant: str, quick: bool) -> Record:
    """Starts the servers and acts as the chief."""
    os.environ |= {"TF_USE_LEGACY_KERAS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    count = plan(workload, quick).workers
    with _servers(count) as (server, workers):
        record = _chief(workload, quick)
        record["server_bytes"] = machine.peak_bytes(server)
        return {**record, "worker_bytes": max(map(machine.peak_bytes, workers))}


@contextmanager
def _servers(workers: int) -> Iterator[tuple[int, list[int]]]:
    """Yields the process ids of parameter server and workers, and makes this process the chief."""
    cluster = {name: [f"127.0.0.1:{free_port()}"] for name in ("chief", "ps")}
    cluster["worker"] = [f"127.0.0.1:{free_port()}" for _ in range(workers)]

    def task(kind: str, index: int) -> str:
        return json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})

    children = [
        subprocess.Popen([sys.executable, "-c", _SERVER], env={**os.environ, "TF_CONFIG": task(kind, index)})
        for kind, index in [("ps", 0), *(("worker", index) for index in range(workers))]
    ]
    os.environ["TF_CONFIG"] = task("chief", 0)
    try:
        yield children[0].pid, [child.pid for child in children[1:]]
    finally:
        for child in children:
            child.kill()
            child.wait()


def _chief(workload: str, quick: bool) -> Record:
    tf = importlib.import_module("tensorflow")
    adadelta = importlib.import_module("tf_keras").optimizers.legacy.Adadelta
    strategy = tf.distribute.ParameterServerStrategy(tf.distribute.cluster_resolver.TFConfigClusterResolver())
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
    with strategy.scope():
        variables = [tf.Variable(array) for array in weights_of(shapes_of(workload))]
        optimizer = adadelta(learning_rate=LR, rho=RHO, epsilon=EPS)
    gradients = tuple(gradients_of(shapes_of(workload)))
    data = coordinator.create_per_worker_dataset(lambda: tf.data.Dataset.from_tensors(gradients).repeat())
    batches = iter(data)

    @tf.function  # type: ignore[untyped-decorator,unused-ignore]
    def step(batch: Any) -> Any:
        def replica(pushed: Any) -> Any:
            optimizer.apply_gradients(zip(pushed, variables, strict=True))
            return tf.add_n([tf.reshape(variable.read_value(), [-1])[0] for variable in variables])

        return strategy.run(replica, args=(next(batch),))

    client = Client(
        lambda: coordinator.schedule(step, args=(batches,)).fetch(),
        lambda: [variable.numpy() for variable in variables],
        lambda: None,
    )
    if workload != "c":
        return timed(client, workload, quick, os.getpid())
    done = _workload_c(client, lambda: coordinator.schedule(step, args=(batches,)), coordinator.join, quick)
    return {**done, **judge("c", client.weights(), done["steps"], int(optimizer.iterations.numpy()))}


def _workload_c(client: Client, schedule: Callable[[], object], join: Callable[[], object], quick: bool) -> Record:
    todo = plan("c", quick)
    for _ in range(todo.workers * todo.warmups):
        client.step()
    meter, started, count = Meter(os.getpid()), monotonic(), 0
    while monotonic() < started + todo.seconds:
        for _ in range(_QUEUE):
            schedule()
        join()
        count += _QUEUE
    seconds = monotonic() - started
    rate = {"steps_per_second": count / seconds, "steps": count + todo.workers * todo.warmups}
    return {**rate, **meter.per_step(count)}


if __name__ == "__main__":
    main(("legacy",), run)
