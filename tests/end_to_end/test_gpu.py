"""A server on a GPU gives the same bits as one on the CPU; and the parameters of a worker may be on a GPU."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

import deltaserve
from deltaserve_server import LocalServer, ServerConfig
from deltaserve_server.config import DeviceKind

pytestmark = pytest.mark.gpu

Weights = dict[str, NDArray[np.float32]]
SHAPES = {"w": (1300, 700), "b": (700,), "s": ()}


@pytest.fixture(autouse=True)
def gpu() -> None:
    """Skips without a GPU; torch is imported here because the import takes seconds and only these tests need it."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")


def random(seed: int) -> Weights:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in SHAPES.items()}


def alone(client: deltaserve.Client) -> Weights:
    """Steps of one worker: plain ones, with absent tensors, after a new state, and after an extension."""
    model = client.create_model("alone", random(0), weight_decay=0.01)
    with model.worker() as worker:
        for seed in range(1, 4):
            worker.step(random(seed))
        worker.step({**random(4), "w": None})
        state = model.pull_state()
        model.put_state(state)
        worker.step(random(5))
    model.extend({"v": np.ones(5, np.float32)}, groups=[deltaserve.Hyperparameters(lr=0.5)], group_of={"v": 1})
    with model.worker() as worker:
        return worker.step({**random(6), "v": np.full(5, 2, np.float32)})


def together(client: deltaserve.Client) -> Weights:
    """Rounds of three workers; the second worker has no gradient for one tensor."""
    model = client.create_model("together", random(0), policy=deltaserve.Sync(min_workers=3))
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


@pytest.mark.parametrize("run", [alone, together])
def test_gpu_and_cpu_give_the_same_bits(run: Callable[[deltaserve.Client], Weights]) -> None:
    results = []
    devices: tuple[DeviceKind, ...] = ("cpu", "cuda")
    for device in devices:
        config = ServerConfig(bind="127.0.0.1:0", device=device)
        with LocalServer(config) as server, deltaserve.connect(server.target, timeout_seconds=60) as client:
            assert client.server_info().device_kind == device
            results.append({name: array.copy() for name, array in run(client).items()})
    for name, array in results[0].items():
        np.testing.assert_array_equal(array, results[1][name], err_msg=name)


def test_parameters_on_a_gpu_train_as_with_torchs_own_optimizer() -> None:
    import torch

    from deltaserve.torch import RemoteAdadelta

    torch.manual_seed(0)
    remote, local = (torch.nn.Linear(30, 20).cuda() for _ in range(2))
    local.load_state_dict(remote.state_dict())
    inputs = torch.randn(64, 30, device="cuda")
    with LocalServer(ServerConfig(bind="127.0.0.1:0", device="cuda")) as server:
        optimizer = RemoteAdadelta(remote.parameters(), server.target, model="net", timeout_seconds=60)
        own = torch.optim.Adadelta(local.parameters())
        for _ in range(50):
            for net, by in ((remote, optimizer), (local, own)):
                by.zero_grad()
                net(inputs).square().mean().backward()
                by.step()
        for left, right in zip(remote.parameters(), local.parameters(), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
        state = optimizer.state_dict()["state"]
        assert all(value["square_avg"].device.type == "cuda" for value in state.values())
        own.load_state_dict(optimizer.state_dict())
        optimizer.load_state_dict(own.state_dict())
        optimizer.close()
