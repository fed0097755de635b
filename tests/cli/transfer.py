"""The model that the tests of `export` and `import` move, and changes to its file."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save

import deltaserve

Command = Callable[..., "subprocess.CompletedProcess[str]"]
Arrays = dict[str, np.ndarray[Any, np.dtype[Any]]]
Edit = Callable[[Arrays, dict[str, str]], object]

NOWHERE = "127.0.0.1:9"
SHAPES = {"z": (3, 2), "a": (), "m/é": (0, 3), "b": (5,)}
"""A layout whose order safetensors, which sorts by name, does not keep."""

GROUPS = [
    deltaserve.Adadelta(lr=0.1 + 0.2, rho=0.95, eps=1e-3),
    deltaserve.Adadelta(lr=1 / 3, weight_decay=1e-300, maximize=True),
]
GROUP_OF = {"a": 1, "b": 1}


def numbers(seed: int) -> Arrays:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def step(model: deltaserve.Model, seeds: range) -> None:
    with model.worker() as worker:
        for seed in seeds:
            gradient: dict[str, Any] = {**numbers(seed), "b": None if seed % 2 else numbers(seed)["b"]}
            worker.step(gradient)


def bits(state: deltaserve.ModelState) -> dict[str, object]:
    assert state.slots is not None
    vectors = {"weights": state.weights, **state.slots}
    return {
        "update_counts": dict(state.update_counts),
        **{key: [(n, v.shape, v.tobytes()) for n, v in held.items()] for key, held in vectors.items()},
    }


def edit(file: Path, change: Edit) -> None:
    """Changes tensors and metadata of a file."""
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors, metadata)
    file.write_bytes(save(tensors, metadata=metadata))


def edit_config(file: Path, change: Callable[[Any], object]) -> None:
    def changed(_: Arrays, metadata: dict[str, str]) -> None:
        config = json.loads(metadata["config"])
        change(config)
        metadata["config"] = json.dumps(config)

    edit(file, changed)


def refusal(ended: "subprocess.CompletedProcess[str]") -> str:
    """Returns the error line of a command that failed."""
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("deltaserve: ")
    assert ended.stderr.count("\n") == 1
    assert "a bug in deltaserve" not in ended.stderr
    return ended.stderr
