"""A worker that uses what a worker needs: both doors, the whole state, an error. Its libraries are the oldest."""

import sys

import google.protobuf
import grpc
import numpy as np

import deltaserve


def main() -> None:
    """Trains a small and a large model against the server at the address that is given."""
    with deltaserve.connect(sys.argv[1], timeout_seconds=60) as client:
        for size in (6, 3_000_000):
            model = client.create_model(f"floor-{size}", {"w": np.zeros(size), "b": np.zeros(())})
            with model.worker() as worker:
                for _ in range(3):
                    weights = worker.step({"w": np.ones(size), "b": None})
            assert (weights["w"] < 0).all()
            state = model.pull_state()
            assert state.update_counts == {"w": 3, "b": 0}
            model.put_state(state)
        reason = None
        try:
            client.create_model("floor-6", {"w": np.zeros(7)})
        except deltaserve.ConflictError as error:
            reason = error.reason
        assert reason == "MODEL_MISMATCH"
    versions = f"grpcio {grpc.__version__}, protobuf {google.protobuf.__version__}, numpy {np.__version__}"
    print(f"the client works with {versions}")


if __name__ == "__main__":
    main()
