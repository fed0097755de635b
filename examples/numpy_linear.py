"""A worker in numpy, without torch: a linear regression whose weights and Adadelta live on a server.

    python examples/numpy_linear.py [HOST:PORT]

Several at a time with the same HOST:PORT (`deltaserve serve`) train one model together; without it, a server lives
inside this process as long as the training.
"""

import sys

import numpy as np

import deltaserve
from deltaserve_server import LocalServer

TRUE_W, TRUE_B = np.array([2.0, -3.4], np.float32), np.array([4.2], np.float32)


def train(target: str) -> float:
    """Trains against the server at `target`; returns by how much the weights are off at most."""
    random = np.random.default_rng()
    first = {"w": np.zeros(2, np.float32), "b": np.zeros(1, np.float32)}
    with deltaserve.connect(target) as client:
        model = client.create_model("line", first, rho=0.9, eps=1e-4)  # creates it, or joins
        with model.worker() as worker:
            weights = worker.pull()
            for _ in range(2000):
                x = random.standard_normal((32, 2), np.float32)
                y = x @ TRUE_W + TRUE_B + np.float32(0.01) * random.standard_normal(32, np.float32)
                error = (x @ weights["w"] + weights["b"] - y) / np.float32(len(x))
                weights = worker.step({"w": x.T @ error, "b": error.sum(keepdims=True)})
            print(f"w = {weights['w']}, b = {weights['b']} after {worker.version} updates")
            return float(max(np.abs(weights["w"] - TRUE_W).max(), np.abs(weights["b"] - TRUE_B).max()))


def main() -> None:
    """Trains against the server that is named, or against one of its own."""
    if len(sys.argv) > 1:
        error = train(sys.argv[1])
    else:
        with LocalServer() as server:
            error = train(server.target)
    print(f"largest error: {error:.4f}")


if __name__ == "__main__":
    main()
