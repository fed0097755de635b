"""The reference implementation, compared with torch's optimizer in double precision."""

import numpy as np
import torch

from deltaserve_server.optimizers import Hyperparameters, reference


def test_the_reference_equals_torch_in_double_precision() -> None:
    rng = np.random.default_rng(0)
    hyperparameters = Hyperparameters(lr=0.3, rho=0.95, eps=1e-5, weight_decay=0.01, maximize=True)
    parameter = torch.nn.Parameter(torch.from_numpy(rng.standard_normal(1000)))
    optimizer = torch.optim.Adadelta([parameter], lr=0.3, rho=0.95, eps=1e-5, weight_decay=0.01, maximize=True)
    state = np.zeros(1000), np.zeros(1000), parameter.detach().numpy().copy()
    for _ in range(100):
        gradient = rng.standard_normal(1000)
        state = reference.update(gradient, *state, hyperparameters)
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
    for vector, name in zip(state, ("square_avg", "acc_delta"), strict=False):
        np.testing.assert_allclose(vector, optimizer.state[parameter][name].numpy(), rtol=1e-12)
    np.testing.assert_allclose(state[2], parameter.detach().numpy(), rtol=1e-12, atol=1e-12)
