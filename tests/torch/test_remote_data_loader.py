"""A DataLoader whose workers are forked while an optimizer is open."""

import subprocess
import sys

import pytest

import deltaserve

PROGRAM = """
import sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from deltaserve.torch import RemoteAdadelta

torch.manual_seed(0)
net = nn.Linear(4, 1)
data = TensorDataset(torch.randn(64, 4), torch.randn(64, 1))
optimizer = RemoteAdadelta(net.parameters(), sys.argv[1], model="loader", timeout_seconds=30)
for epoch in range(3):  # each epoch forks two processes while another thread renews the session's lease
    for x, y in DataLoader(data, batch_size=16, num_workers=2, multiprocessing_context="fork"):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
print(optimizer.last_result.version)
"""


@pytest.mark.deep
def test_a_data_loader_with_processes_of_its_own(client: deltaserve.Client) -> None:
    """The program does not close its optimizer; the session ends with the process."""
    target = client.target
    warnings = [] if sys.version_info >= (3, 12) else ["-W", "error"]  # newer versions warn of a fork beside threads
    done = subprocess.run(
        [sys.executable, *warnings, "-c", PROGRAM, target], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout.strip()) == (0, "12"), done.stderr
    assert client.model("loader").info().sessions == ()
    client.delete_model("loader")
