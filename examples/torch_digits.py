"""Handwritten digits with torch and the optimizer on a server: three lines differ from a local `torch.optim.Adadelta`.

    python examples/torch_digits.py [HOST:PORT]

With HOST:PORT, the address of a `deltaserve serve`, several of these train one model together. Without it, a server
runs in this process for as long as the training takes.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

from deltaserve.torch import RemoteAdadelta  # 1: was `from torch.optim import Adadelta`
from deltaserve_server import LocalServer

EPOCHS, BATCH = 10, 32


def train(target: str) -> float:
    """Trains with the server at `target` and returns the accuracy on the test images."""
    bunch = load_digits()
    images, digits = torch.tensor(bunch.data / 16, dtype=torch.float32), torch.tensor(bunch.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, learn = order[:360], order[360:]
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    optimizer = RemoteAdadelta(model.parameters(), target, model="digits-torch", lr=1.0, rho=0.9)  # 2
    for epoch in range(EPOCHS):
        for rows in learn[torch.randperm(len(learn))].split(BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[rows]), digits[rows])
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    optimizer.close()  # 3

    with torch.no_grad():
        return float((model(images[test]).argmax(dim=1) == digits[test]).float().mean())


def main() -> None:
    """Trains with the server given on the command line, or with one of its own."""
    if len(sys.argv) > 1:
        accuracy = train(sys.argv[1])
    else:
        with LocalServer() as server:
            accuracy = train(server.target)
    print(f"test accuracy: {accuracy:.3f}")


if __name__ == "__main__":
    main()
