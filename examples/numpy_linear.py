"""Linear regression with numpy: the weights and Adadelta's state live on a server. No torch needed.

    python examples/numpy_linear.py [HOST:PORT]

With HOST:PORT, the address of a `deltaserve serve`, several of these train one model together. Without it, a server
runs in this process for as long as the training takes.
"""

import sys

import numpy as np

import deltaserve
from deltaserve_server import LocalServer

TRUE_W, TRUE_B = np.array([2.0, -3.4], np.float32), np.array([4.2], np.float32)


def train(target: str) -> float:
    """Trains with the server at `target` and returns the largest error of a weight."""
    random = np.random.default_rng()
    initial = {"w": np.zeros(2, np.float32), "b": np.zeros(1, np.float32)}
    with deltaserve.connect(target) as client:
        optimizer = deltaserve.Adadelta(rho=0.9, eps=1e-4)  # or SGD, Adagrad, RMSprop, Adam, AdamW
        model = client.create_model("line", initial, optimizer=optimizer)  # creates the model or joins it
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
    """Trains with the server given on the command line, or with one of its own."""
    if len(sys.argv) > 1:
        error = train(sys.argv[1])
    else:
        with LocalServer() as server:
            error = train(server.target)
    print(f"largest error: {error:.4f}")


if __name__ == "__main__":
    main()
