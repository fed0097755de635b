"""deltaserve in a notebook: a server in this process, workers in threads, and a look at the optimizer state.

Open this file in an editor that supports `# %%` cells, or run it: `python examples/notebook.py`.
"""

# %% Start a server in this process. In a single cell, `with LocalServer() as server:` does the same.
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import deltaserve
from deltaserve_server import LocalServer

server = LocalServer()
server.start()
print("server:", server.target)

# %% Create a model for two synchronous workers: each update uses the mean of their gradients.
WORKERS = 2
client = deltaserve.connect(server.target)
model = client.create_model(
    "parabola",
    {"x": np.full(4, 3.0, np.float32)},
    optimizer=deltaserve.Adadelta(eps=1e-4),
    policy=deltaserve.Sync(min_workers=WORKERS),
)
print("created:", model.created, "policy:", model.policy)


# %% Train. Each worker minimises its own parabola; together they settle half-way between the two minima.
def minimise(goal: float) -> float:
    """Makes 1000 steps towards `goal` and returns the position reached."""
    with deltaserve.connect(server.target) as own, own.model("parabola").worker() as worker:
        weights = worker.pull()
        for _ in range(1000):
            weights = worker.step({"x": weights["x"] - np.float32(goal)})
        return float(weights["x"][0])


with ThreadPoolExecutor(WORKERS) as threads:
    print("reached:", list(threads.map(minimise, [-1.0, 2.0])), "expected: 0.5")

# %% Look at the model's state: the weights and Adadelta's two running averages, all of one version.
state = model.pull_state()
assert state.slots is not None
print("version:", state.version)
print("weights:", state.weights["x"])
print("square_avg:", state.slots["square_avg"]["x"])

# %% Stop.
client.close()
server.stop(grace_seconds=0)
