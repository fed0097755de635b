"""A notebook's worth of deltaserve: a server inside the notebook, workers in threads, a look at the model's state.

Open it in an editor that knows `# %%` cells, or run it as it is: `python examples/notebook.py`.
"""

# %% A server in this process. `with LocalServer() as server:` does the same inside one cell.
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import deltaserve
from deltaserve_server import LocalServer

server = LocalServer()
server.start()
print("server:", server.target)

# %% A model with two synchronous workers: each update takes the mean of both gradients.
WORKERS = 2
client = deltaserve.connect(server.target)
model = client.create_model(
    "parabola", {"x": np.full(4, 3.0, np.float32)}, eps=1e-4, policy=deltaserve.Sync(min_workers=WORKERS)
)
print("created:", model.created, "policy:", model.policy)


# %% Each worker minimises its own parabola; together they meet in the middle.
def minimise(goal: float) -> float:
    """Steps towards `goal`; returns where it has arrived."""
    with deltaserve.connect(server.target) as own, own.model("parabola").worker() as worker:
        weights = worker.pull()
        for _ in range(1000):
            weights = worker.step({"x": weights["x"] - np.float32(goal)})
        return float(weights["x"][0])


with ThreadPoolExecutor(WORKERS) as threads:
    print("arrived at:", list(threads.map(minimise, [-1.0, 2.0])), "expected: 0.5")

# %% What the server holds: weights and Adadelta's two averages, all of one version.
state = model.pull_state()
assert state.square_avg is not None
print("version:", state.version)
print("weights:", state.weights["x"])
print("square_avg:", state.square_avg["x"])

# %% The end.
client.close()
server.stop(grace_seconds=0)
