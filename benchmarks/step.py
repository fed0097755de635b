"""A worker's step over every transport and for models of every size, beside the cost of the bytes alone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from time import process_time

import deltaserve
from benchmarks import baselines, machine
from benchmarks.baselines import BOTH_AT_ONCE, ECHO, EMPTY_CALL, THERE_AND_BACK, Run
from benchmarks.kernel import KERNEL, kernel_alone
from benchmarks.local import DEFAULT, local_optimizer, local_optimizers, notes_on_local
from benchmarks.models import SHAPES_A, SHAPES_B, Shape, Tensors, elements, gradients_of, named, shapes_of, weights_of
from benchmarks.processes import BFLOAT16, TCP, TRANSPORTS, Transport, server
from benchmarks.results import Figures, Result, Timings
from benchmarks.timing import REST_SECONDS, by_turns
from deltaserve.torch._element_types import TORCH_ELEMENT_TYPES
from deltaserve_server.config import DeviceKind

SIZES = (1, 1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
FULL_SIZES = (*SIZES, 1_000_000_000)
QUICK_SIZES = SIZES[:-1:2]

_SERVER_VECTORS, _WORKER_VECTORS = 6, 2
"""Vectors of the model's size. Server: two versions of the weights, two of state, a push, gRPC's buffers; worker:
weights, gRPC's buffers."""

_ONE_THREAD = 1 << 15
"""The largest number of elements for which torch uses one thread."""

_BYTES_A_RUN = 2 << 30
"""Bytes of parameters per size, which determine the number of rounds, within limits."""


def large(rounds: int, device: DeviceKind = "cpu", shapes: Sequence[Shape] = SHAPES_A) -> Timings:
    """Times a step of workload A, the model on `device`."""
    gradients = gradients_of(shapes)
    size = elements(shapes) * 4
    with ExitStack() as stack:
        there_and_back, both_at_once = stack.enter_context(baselines.raw_tcp(size))
        contenders: dict[str, Callable[[], object]] = {
            THERE_AND_BACK: there_and_back,
            BOTH_AT_ONCE: both_at_once,
            ECHO: baselines.echo(stack.enter_context(baselines.grpc_server()), size),
            **_workers(stack, (*TRANSPORTS, BFLOAT16), shapes, named(gradients), device),
            KERNEL: stack.enter_context(kernel_alone(gradients)),
            **local_optimizers(weights_of(shapes), gradients),
        }
        title = f"step: {size / 4e6:.3g} M parameters in {len(shapes)} tensors, model on {device}"
        return Timings(
            title, THERE_AND_BACK, by_turns(contenders, rounds, rest_seconds=REST_SECONDS), notes=notes_on_local()
        )


def small(rounds: int) -> Timings:
    """Times a step of workload B."""
    gradients = gradients_of(SHAPES_B)
    with ExitStack() as stack:
        contenders: dict[str, Callable[[], object]] = {
            EMPTY_CALL: baselines.empty_call(stack.enter_context(baselines.grpc_server())),
            **_workers(stack, TRANSPORTS, SHAPES_B, named(gradients), "cpu"),
            "raw TCP, 24 bytes there and back": stack.enter_context(baselines.raw_tcp(24))[0],
            DEFAULT: local_optimizer(weights_of(SHAPES_B), gradients, None).step,
        }
        title = f"step: {elements(SHAPES_B)} parameters"
        return Timings(title, EMPTY_CALL, by_turns(contenders, rounds, warmups=100), "us")


def of_size(count: int, fraction: float = 1.0) -> Result:
    """Times a step of a model of one tensor with `count` elements.

    Args:
        count: Number of elements.
        fraction: Fraction of the usual number of rounds.

    Returns:
        The timings, or an empty table with a note if there is not enough memory.
    """
    title = f"step: one tensor of {count:,} parameters"
    needed = 4 * count * (len(TRANSPORTS) * (_SERVER_VECTORS + _WORKER_VECTORS) + 4 + 5)
    if needed > machine.available_bytes():
        available = machine.available_bytes()
        note = f"Not measured: needs {needed / 1e9:.0f} GB of memory, {available / 1e9:.0f} GB are available."
        return Figures(title, (), notes=(note,))
    rounds = max(round(min(_BYTES_A_RUN // (4 * count), 500) * fraction), 5)
    shapes = shapes_of(str(count))
    gradients = gradients_of(shapes)
    rest = REST_SECONDS if count > _ONE_THREAD else 0.0
    with ExitStack() as stack:
        contenders: dict[str, Callable[[], object]] = {
            THERE_AND_BACK: stack.enter_context(baselines.raw_tcp(4 * count))[0],
            **_workers(stack, TRANSPORTS, shapes, named(gradients), "cpu"),
            KERNEL: stack.enter_context(kernel_alone(gradients)),
            DEFAULT: local_optimizer(weights_of(shapes), gradients, None).step,
        }
        return Timings(title, THERE_AND_BACK, by_turns(contenders, rounds, warmups=3, rest_seconds=rest))


def processor_time(rounds: int, shapes: Sequence[Shape] = SHAPES_A) -> Figures:
    """Measures the processor time of a step in the worker and in the server, over TCP."""
    rows: dict[str, tuple[float | None, ...]] = {}
    for name, model in ((f"{elements(shapes) / 1e6:.3g} M parameters", shapes), ("6 parameters", SHAPES_B)):
        count = rounds if model is shapes else rounds * 200
        gradients = named(gradients_of(model))
        with server() as (target, pid), worker_step(target, TCP, model, gradients) as step:
            step()
            ours, theirs = process_time(), machine.cpu_seconds(pid)
            for _ in range(count):
                step()
            rows[name] = ((process_time() - ours) / count * 1e3, (machine.cpu_seconds(pid) - theirs) / count * 1e3)
    return Figures("step: processor time, TCP", ("worker ms", "server ms"), rows)


def _workers(
    stack: ExitStack, transports: Sequence[Transport], shapes: Sequence[Shape], gradients: Tensors, device: DeviceKind
) -> dict[str, Run]:
    """Returns a worker's step over each transport, each with its own server."""
    found = {}
    for transport in transports:
        target, _ = stack.enter_context(server(transport, device))
        found[transport.row] = stack.enter_context(worker_step(target, transport, shapes, gradients))
    return found


@contextmanager
def worker_step(target: str, transport: Transport, shapes: Sequence[Shape], gradients: Tensors) -> Iterator[Run]:
    """Yields a worker's step, which returns when the weights are in the worker's memory."""
    with ExitStack() as stack:
        client = stack.enter_context(deltaserve.connect(target))
        model = client.create_model("bench", named(weights_of(shapes)))
        worker = stack.enter_context(_worker(model, transport))
        yield lambda: worker.step(gradients)


def _worker(model: deltaserve.Model, transport: Transport) -> deltaserve.Worker:
    """Returns a worker that converts narrow element types with torch, as RemoteAdadelta does."""
    settings = dict(transport.worker)
    wire = TORCH_ELEMENT_TYPES[settings.pop("wire", "float32")]
    return model._worker(None, None, settings.pop("transport"), wire)
