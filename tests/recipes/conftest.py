"""A server for all tests, and airfoil data: the real file if it is available, and a synthetic one."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deltaserve_server import LocalServer
from deltaserve_server.recipes.data import AIRFOIL_FILE

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def target() -> Iterator[str]:
    with LocalServer() as server:
        yield server.target


@pytest.fixture
def model() -> str:
    return f"model-{secrets.token_hex(6)}"


@pytest.fixture(scope="session")
def real_file() -> Path:
    given = Path(os.environ.get("DELTASERVE_DATA") or SHARED_DATA)
    file = given / AIRFOIL_FILE if given.is_dir() else given
    if not file.is_file():
        pytest.skip(f"{AIRFOIL_FILE} is not here: set DELTASERVE_DATA to it")
    return file


@pytest.fixture(scope="session")
def synthetic_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the format of the real one: 1503 rows, 6 columns separated by tabs, CRLF, columns of varied scale."""
    random = np.random.default_rng(7)
    features = random.standard_normal((1503, 5)) * [3000.0, 6.0, 0.1, 15.0, 0.01] + [2800.0, 7.0, 0.14, 50.0, 0.01]
    label = 125.0 - 0.0012 * features[:, 0] - 0.4 * features[:, 1] + 4.8 * random.standard_normal(1503)
    rows = np.column_stack([features, label])
    file = tmp_path_factory.mktemp("data") / AIRFOIL_FILE
    file.write_bytes("".join("\t".join(f"{value:.8g}" for value in row) + "\r\n" for row in rows).encode())
    return file
