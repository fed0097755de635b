"""A server on a GPU gives the same bits as one on the CPU; and the parameters of a worker may be on a GPU."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import deltaserve
from deltaserve_server import LocalServer, ServerConfig
from deltaserve_server.config import DeviceKind

pytestmark = pytest.mark.gpu

Weights = dict[str, NDArray[np.float32]]
SHAPES = {"w": (1300, 700), "b": (700,), "s": ()}

OPTIMIZERS: tuple[deltaserve.Optimizer, ...] = (
    deltaserve.Adadelta(weight_decay=0.01),
    deltaserve.SGD(lr=0.1),
    deltaserve.SGD(lr=0.1, momentum=0.9, nesterov=True),
    deltaserve.Adagrad(lr_decay=0.1, initial_accumulator_value=0.5),
    deltaserve.RMSprop(momentum=0.9, centered=True),
    deltaserve.Adam(amsgrad=True, maximize=True),
    deltaserve.AdamW(),
)
over_optimizers = pytest.mark.parametrize(
    "optimizer", OPTIMIZERS, ids=lambda optimizer: "-".join(map(str, optimizer.structure))
)


@pytest.fixture(autouse=True)
def gpu() -> None:
    """Skips without a GPU; torch is imported here because the import takes seconds and only these tests need it."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")


def random(seed: int) -> Weights:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in SHAPES.items()}


def alone(client: deltaserve.Client, optimizer: deltaserve.Optimizer) -> Weights:
    """Steps of one worker: plain ones, with absent tensors, after a new state, and after an extension."""
    model = client.create_model("alone", random(0), optimizer=optimizer)
    with model.worker() as worker:
        for seed in range(1, 4):
            worker.step(random(seed))
        worker.step({**random(4), "w": None})
        state = model.pull_state()
        model.put_state(state)
        worker.step(random(5))
    group = replace(optimizer, lr=0.5)
    model.extend({"v": np.ones(5, np.float32)}, groups=[group], group_of={"v": 1})
    with model.worker() as worker:
        return worker.step({**random(6), "v": np.full(5, 2, np.float32)})


def together(client: deltaserve.Client, optimizer: deltaserve.Optimizer) -> Weights:
    """Rounds of three workers; the second worker has no gradient for one tensor."""
    model = client.create_model("together", random(0), optimizer=optimizer, policy=deltaserve.Sync(min_workers=3))
    workers = [model.worker(name) for name in "abc"]
    for seed in range(3):
        gradients = [{**random(10 * seed + k), **({"w": None} if k == 1 else {})} for k in range(3)]
        with ThreadPoolExecutor(3) as pool:
            weights: list[Weights] = list(
                pool.map(lambda pair: pair[0].step(pair[1]), zip(workers, gradients, strict=True))
            )
    for worker in workers:
        worker.close()
    return weights[0]


@over_optimizers
@pytest.mark.parametrize("run", [alone, together])
def test_gpu_and_cpu_give_the_same_bits(
    run: Callable[[deltaserve.Client, deltaserve.Optimizer], Weights], optimizer: deltaserve.Optimizer
) -> None:
    results = []
    devices: tuple[DeviceKind, ...] = ("cpu", "cuda")
    for device in devices:
        config = ServerConfig(bind="127.0.0.1:0", device=device)
        with LocalServer(config) as server, deltaserve.connect(server.target, timeout_seconds=60) as client:
            assert client.server_info().device_kind == device
            results.append({name: array.copy() for name, array in run(client, optimizer).items()})
    for name, array in results[0].items():
        np.testing.assert_array_equal(array, results[1][name], err_msg=name)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Adadelta", {}),
        ("SGD", {"lr": 0.1, "momentum": 0.9}),
        ("Adagrad", {}),
        ("RMSprop", {"momentum": 0.9}),
        ("Adam", {"amsgrad": True}),
        ("AdamW", {}),
    ],
)
def test_parameters_on_a_gpu_train_as_with_torchs_own_optimizer(name: str, options: dict[str, Any]) -> None:
    import torch

    import deltaserve.torch

    torch.manual_seed(0)
    remote, local = (torch.nn.Linear(30, 20).cuda() for _ in range(2))
    local.load_state_dict(remote.state_dict())
    inputs = torch.randn(64, 30, device="cuda")
    with LocalServer(ServerConfig(bind="127.0.0.1:0", device="cuda")) as server:
        kind = getattr(deltaserve.torch, f"Remote{name}")
        optimizer = kind(remote.parameters(), server.target, model="net", timeout_seconds=60, **options)
        own = getattr(torch.optim, name)(local.parameters(), **options)
        for _ in range(50):
            for net, by in ((remote, optimizer), (local, own)):
                by.zero_grad()
                net(inputs).square().mean().backward()
                by.step()
        for left, right in zip(remote.parameters(), local.parameters(), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
        state = optimizer.state_dict()["state"]
        vectors = [value for values in state.values() for key, value in values.items() if key != "step"]
        assert vectors
        assert all(vector.device.type == "cuda" for vector in vectors)
        own.load_state_dict(optimizer.state_dict())
        optimizer.load_state_dict(own.state_dict())
        optimizer.close()
